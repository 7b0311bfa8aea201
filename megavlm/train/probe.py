"""Our side of a probe: a directory's or a checkpoint's model, in fp32, in this process.

Shape suffixes: S tokens, V visual tokens, K slots, H hidden size.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megavlm.checkpoint.convert import load_checkpoint_weights
from megavlm.checkpoint.hf_io import HFDirectory
from megavlm.checkpoint.hf_load import load_weights
from megavlm.data.encode import open_encoder
from megavlm.data.packing import pack
from megavlm.data.pixels import load_sample_patches
from megavlm.data.sample import Batch, Sample
from megavlm.evaluate.probe import Activations
from megavlm.rollout.native import answer_tokens
from megavlm.train.single import build_single


@torch.no_grad()
def probe_native(directory: HFDirectory, folder: Path | None, sample: Sample, max_new_tokens: int) -> Activations:
    """What our model makes of a conversation.

    Args:
        directory: the model, and its weights where there is no checkpoint.
        folder: a native checkpoint's step folder.
        sample: the conversation.
        max_new_tokens: of the greedy answer.

    Raises:
        UseError: the weights are not those of the directory's config.
    """
    inputs = directory.architecture.inputs
    encoder = open_encoder(directory.path, inputs, directory.architecture.language.max_positions)
    row = encoder.encode_prompt(sample)
    model = build_single(directory, "fp32")
    if folder is not None:
        load_checkpoint_weights(folder, directory, model.parts, model.groups)
    else:
        load_weights(directory, model.parts)
    device = torch.device(torch.cuda.current_device())
    stages: dict[str, torch.Tensor] = {}
    batch = pack(
        [row],
        load_sample_patches(row, encoder),
        sample_multiple=1,
        total_multiple=1,
        pad_token_id=encoder.tokenizer.pad_token_id,
        patch_channels=inputs.patch_channels,
    )
    if row.grids_thw:
        features_VKH = model.encoder(batch.patches_PC.to(device), batch.grid_thw_N3.to(device))
        stages["features"] = features_VKH[:, 0].cpu()

    def keep(number: int) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden_SKH = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            stages[f"layer {number}"] = hidden_SKH[:, 0].cpu()

        return hook

    layers = model.language.language.decoder.layers
    hooks = [layer.register_forward_pre_hook(keep(n), with_kwargs=True) for n, layer in enumerate(layers)]
    stages["logits"] = model.logits(batch, device).cpu()
    for hook in hooks:
        hook.remove()

    def run_forward(batch: Batch, choose: Callable[[torch.Tensor, Batch], torch.Tensor]) -> torch.Tensor:
        return choose(model.logits(batch, device), batch)

    (answer,) = answer_tokens([row], encoder, model.groups, run_forward, 1, 1, max_new_tokens)
    return Activations(row.tokens_S.tolist(), stages, answer)

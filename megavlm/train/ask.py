"""Ask one question of a directory's or a checkpoint's model, in one process."""

from collections.abc import Callable
from pathlib import Path

import torch

from megavlm.checkpoint.convert import load_checkpoint_weights
from megavlm.checkpoint.hf_io import HFDirectory, load_weights
from megavlm.checkpoint.native import find_checkpoint
from megavlm.data.encode import SampleEncoder
from megavlm.data.images import read_image_spec
from megavlm.data.readers import IMAGE_PLACEHOLDER
from megavlm.data.sample import Batch, Sample, Turn
from megavlm.data.tokens import Tokenizer
from megavlm.errors import use_error
from megavlm.rollout.native import greedy_answers
from megavlm.train.single import build_single


@torch.no_grad()
def ask(
    hf_dir: str,
    checkpoint: str | None,
    prompt: str,
    images: tuple[str, ...],
    system: str | None,
    max_new_tokens: int,
    precision: str,
) -> str:
    """Greedy answer to a prompt.

    Raises:
        UseError: images and placeholders do not agree, or the model cannot be read.
    """
    num_named = prompt.count(IMAGE_PLACEHOLDER)
    if num_named not in (0, len(images)):
        raise use_error(
            "--prompt",
            f"{num_named} {IMAGE_PLACEHOLDER}",
            f"{len(images)}, one for each --image, or none",
            "put as many into the prompt as there are images",
        )
    text = prompt if num_named else IMAGE_PLACEHOLDER * len(images) + prompt
    directory = HFDirectory(hf_dir)
    inputs = directory.architecture.inputs
    longest = directory.architecture.language.max_positions
    encoder = SampleEncoder(
        inputs,
        read_image_spec(hf_dir, inputs, 0, 0),
        Tokenizer(hf_dir, inputs.image_token_id, inputs.has_borders),
        longest,
    )
    turns = ((Turn("system", system),) if system else ()) + (Turn("user", text),)
    row = encoder.encode_prompt(Sample("prompt", turns, images))
    model = build_single(directory, precision)
    if checkpoint:
        folder = find_checkpoint(Path(checkpoint), required=True)
        assert folder is not None
        load_checkpoint_weights(folder, directory, model.parts, model.groups)
    else:
        load_weights(directory, model.parts)
    device = torch.device(torch.cuda.current_device())

    def run_forward(batch: Batch, choose: Callable[[torch.Tensor, Batch], torch.Tensor]) -> torch.Tensor:
        return choose(model.logits(batch, device), batch)

    return greedy_answers([row], encoder, model.groups, run_forward, 1, 1, max_new_tokens)[0]

"""Ask one question of a directory's or a checkpoint's model, in one process."""

from collections.abc import Callable
from pathlib import Path

import torch

from megavlm.checkpoint.convert import checked_common, load_checkpoint_weights
from megavlm.checkpoint.hf_io import HFDirectory
from megavlm.checkpoint.hf_load import load_weights
from megavlm.checkpoint.native import find_checkpoint
from megavlm.data.encode import open_encoder
from megavlm.data.readers import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from megavlm.data.sample import Batch, Sample, Turn
from megavlm.errors import use_error
from megavlm.rollout.native import greedy_answers
from megavlm.train.single import build_single


@torch.no_grad()
def ask(
    hf_dir: str,
    checkpoint: str | None,
    prompt: str,
    images: tuple[str, ...],
    videos: tuple[str, ...],
    system: str | None,
    max_new_tokens: int,
    precision: str,
) -> str:
    """Greedy answer to a prompt.

    Raises:
        UseError: images or videos and placeholders do not agree, or the model cannot be read.
    """
    text = prompt
    for placeholder, files in ((VIDEO_PLACEHOLDER, videos), (IMAGE_PLACEHOLDER, images)):
        num_named = prompt.count(placeholder)
        if num_named not in (0, len(files)):
            kind = placeholder.strip("<>")
            raise use_error(
                "--prompt",
                f"{num_named} {placeholder}",
                f"{len(files)}, one for each --{kind}, or none",
                f"put as many into the prompt as there are {kind}s",
            )
        text = text if num_named else placeholder * len(files) + text
    directory = HFDirectory(hf_dir)
    directory.check_has_words("answers")
    architecture = directory.architecture
    folder = find_checkpoint(Path(checkpoint), required=True) if checkpoint else None
    # Of the run, if it had a template of its own.
    template = checked_common(folder, directory).get("chat_template", "") if folder is not None else ""
    encoder = open_encoder(hf_dir, architecture.inputs, architecture.language.max_positions, template=template)
    turns = ((Turn("system", system),) if system else ()) + (Turn("user", text),)
    row = encoder.encode_prompt(Sample("prompt", turns, images, videos))
    model = build_single(directory, precision)
    if folder is not None:
        load_checkpoint_weights(folder, directory, model.parts, model.groups)
    else:
        load_weights(directory, model.parts)
    device = torch.device(torch.cuda.current_device())

    def run_forward(batch: Batch, choose: Callable[[torch.Tensor, Batch], torch.Tensor]) -> torch.Tensor:
        return choose(model.logits(batch, device), batch)

    return greedy_answers([row], encoder, model.groups, run_forward, 1, 1, max_new_tokens)[0]

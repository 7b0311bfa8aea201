"""Our side of a served chat, in a worker of the pool."""

from collections.abc import Callable
from pathlib import Path

import torch


def answer_with_logprobs(
    hf_dir: str, checkpoint: str, question: str, image: str, num_tokens: int
) -> tuple[list[int], list[float]]:
    """Greedy tokens of a native checkpoint's model, and the log probability of each."""
    from megavlm.checkpoint.convert import load_checkpoint_weights
    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.checkpoint.native import find_checkpoint
    from megavlm.data.encode import SampleEncoder
    from megavlm.data.images import read_image_spec
    from megavlm.data.sample import Batch
    from megavlm.data.tokens import Tokenizer
    from megavlm.evaluate.probe import probe_sample
    from megavlm.rollout.native import answer_tokens
    from megavlm.train.single import build_single

    directory = HFDirectory(hf_dir)
    inputs = directory.architecture.inputs
    tokenizer = Tokenizer(hf_dir, inputs.image_token_id, inputs.has_borders)
    encoder = SampleEncoder(inputs, read_image_spec(hf_dir, inputs), tokenizer, 512)
    row = encoder.encode_prompt(probe_sample(question, (image,)))
    model = build_single(directory, "fp32")
    folder = find_checkpoint(Path(checkpoint), required=True)
    assert folder is not None
    load_checkpoint_weights(folder, directory, model.parts, model.groups)
    logprobs = []

    def run_forward(batch: Batch, choose: Callable[[torch.Tensor, Batch], torch.Tensor]) -> torch.Tensor:
        logits = model.logits(batch, torch.device("cpu"))
        logprobs.append(torch.log_softmax(logits[-1].double(), dim=0).max().item())
        return choose(logits, batch)

    with torch.no_grad():
        (tokens,) = answer_tokens([row], encoder, model.groups, run_forward, 1, 1, num_tokens)
    return tokens, logprobs

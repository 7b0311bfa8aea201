"""A directory with further tokens: rows of the vocabulary grow, and nothing else does."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megavlm.checkpoint.grow import write_with_tokens
from tests.tiny import write_tiny_qwen3vl


def test_heads_of_other_kinds_stay_as_they_are(tmp_path: Path) -> None:
    """What a contrastive run has left beside the model has a row for each number of an embedding, not for each word."""
    hf_dir = write_tiny_qwen3vl(tmp_path / "model")
    (path,) = hf_dir.glob("*.safetensors")
    before = load_file(path)
    size = before["model.language_model.embed_tokens.weight"].shape[1]
    before |= {"embedding_head.weight": torch.randn(24, size), "logit_scale": torch.ones(1)}
    before |= {"itm_head.weight": torch.randn(2, size), "itm_head.bias": torch.zeros(2)}
    save_file(before, path, metadata={"format": "pt"})
    num_new, vocab_size = write_with_tokens(hf_dir, tmp_path / "out", [f"<new {number}>" for number in range(400)])
    (path,) = (tmp_path / "out").glob("*.safetensors")
    after = load_file(path)
    assert num_new == 400 and after.keys() == before.keys()
    grown = {name for name in before if after[name].shape != before[name].shape}
    assert grown and all(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in grown)
    assert all(len(after[name]) == vocab_size for name in grown)
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - grown)

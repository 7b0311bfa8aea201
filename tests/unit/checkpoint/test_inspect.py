"""`megavlm convert inspect`: counts are those of the model."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.running import call
from tests.pool import PoolKeeper
from tests.tiny import write_tiny_qwen3vl

pytestmark = pytest.mark.next_core


def lines_of(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.replace(",", "").split() for line in text.splitlines()[1:]}


def test_both_forms_hold_the_same_values(tmp_path: Path, workers: PoolKeeper) -> None:
    hf_dir, native = write_tiny_qwen3vl(tmp_path / "model"), tmp_path / "native"
    words = ["convert", "import", "--hf-dir", str(hf_dir), "--out", str(native)]
    assert workers(1).run(call, words=words)[0][0] == 0
    [(code, theirs, _)] = workers(1).run(call, words=["convert", "inspect", "--hf-dir", str(hf_dir)])
    [(other, ours, _)] = workers(1).run(call, words=["convert", "inspect", "--checkpoint", str(native)])
    assert code == other == 0
    assert "qwen3_vl, complete" in theirs and "qwen3_vl, step 0, weights alone" in ours
    tensors = load_file(hf_dir / "model.safetensors")
    num_values = sum(tensor.numel() for tensor in tensors.values())
    for text in (theirs, ours):
        found = lines_of(text)
        assert int(found["all"][3]) == num_values and found["all"][-1] == "float32"
        vision = [tensor for name, tensor in tensors.items() if "visual" in name and "merger" not in name]
        assert int(found["vision"][3]) == sum(tensor.numel() for tensor in vision)
    assert int(lines_of(theirs)["all"][1]) == len(tensors)


@pytest.mark.parametrize("words", [[], ["--hf-dir", "a", "--checkpoint", "b"], ["--hf-dir", "a", "--out", "b"]])
def test_one_directory_at_a_time(words: list[str], workers: PoolKeeper) -> None:
    [(code, _, err)] = workers(1).run(call, words=["convert", "inspect", *words])
    assert code == 2 and "either --hf-dir or --checkpoint" in err

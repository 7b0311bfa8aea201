"""The thin scripts do what `megavlm convert` does."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.tiny import write_tiny_qwen3vl

TOOLS_DIR = Path(__file__).resolve().parents[3] / "tools"


def run(script: str, *words: object) -> None:
    done = subprocess.run(
        [sys.executable, str(TOOLS_DIR / script), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=TOOLS_DIR.parent,
    )
    assert done.returncode == 0, done.stderr


def test_there_and_back(tmp_path: Path) -> None:
    hf_dir = write_tiny_qwen3vl(tmp_path / "model", dtype=torch.float16)
    run("hf_to_megatron.py", "--hf-dir", hf_dir, "--out", tmp_path / "native")
    run("megatron_to_hf.py", "--hf-dir", hf_dir, "--checkpoint", tmp_path / "native", "--out", tmp_path / "out")
    before, after = load_file(hf_dir / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.float16 for name in before)

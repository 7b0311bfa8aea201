"""Exported directories behind vLLM's server (its CPU build, in an environment of its own) against our own model.

`make test-serve` makes the environment and runs this; it is no part of `make test`.
"""

import base64
import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.distributed.running import _sharpen, succeed
from tests.evidence import record, row
from tests.pool import PoolKeeper
from tests.serve import cases
from tests.tiny import write_tiny_llava, write_tiny_qwen3vl
from tests.tiny_qwen2_5_vl import write_tiny_qwen2_5_vl

REPO_DIR = Path(__file__).resolve().parents[2]
PYTHON = REPO_DIR / ".venv-serve" / "bin" / "python"
NUM_TOKENS = 12
QUESTION = "what is in this image?"
# vLLM's CPU kernels do not know smaller heads.
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
# Images that need no resizing: vLLM resizes with torchvision, whose pixels are up to 1/255 off from PIL's, which moves
# log probabilities of these models by up to 1e-3.
IMAGE_SIZES = {"qwen2_5_vl": (84, 112), "qwen3_vl": (96, 128), "llava": (28, 28)}
LOGPROB_LIMIT = 1e-4
START_TIMEOUT_S = 400


def write_qwen3_vl(out_dir: Path) -> Path:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    return write_tiny_qwen3vl(
        out_dir, text_changes=HEADS | {"rope_parameters": rope}, vision_changes={"num_heads": 2}, seed=2
    )


def write_qwen2_5_vl(out_dir: Path) -> Path:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [6, 5, 5]}
    changes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope}
    vision = {"num_heads": 2, "out_hidden_size": 128}
    return write_tiny_qwen2_5_vl(out_dir, text_changes=changes, vision_changes=vision, seed=1)


def write_llava(out_dir: Path) -> Path:
    return write_tiny_llava(out_dir, text_changes=HEADS, seed=1)


# With LLaVA's template, the token that begins a text comes from the tokenizer.
WRITERS = {"qwen2_5_vl": write_qwen2_5_vl, "qwen3_vl": write_qwen3_vl, "llava": write_llava}


@pytest.fixture(scope="module", autouse=True)
def environment() -> None:
    if not PYTHON.is_file():
        pytest.skip("no .venv-serve with vLLM; `make test-serve` makes it")


def write_image(path: Path, size: tuple[int, int]) -> Path:
    pixels = np.random.default_rng(3).integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@contextlib.contextmanager
def served(hf_dir: Path, log: Path) -> Iterator[int]:
    """vLLM's server for a directory; yields its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(hf_dir), "--port", str(port)]
    command += ["--served-model-name", "exported", "--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    command += ["--max-num-seqs", "4", "--max-num-batched-tokens", "512", "--skip-mm-profiling"]
    command += ["--limit-mm-per-prompt", json.dumps({"image": 1, "video": 0})]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "PYTHONPATH": str(Path(__file__).parent),  # for sitecustomize.py
    }
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=log.parent)
    try:
        wait_until_ready(port, process, log)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"vLLM ended\n{log.read_text(errors='replace')[-4000:]}"
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
                if response.status == 200:
                    return
        time.sleep(0.5)
    raise AssertionError(f"vLLM did not start\n{log.read_text(errors='replace')[-4000:]}")


def chat(port: int, image: Path, begins_with_token: bool) -> tuple[list[int], list[float]]:
    """Greedy tokens of one image chat, and their log probabilities."""
    url = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    body = {
        "model": "exported",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        "logprobs": True,
        "return_tokens_as_token_ids": True,
        "add_special_tokens": begins_with_token,
        "skip_special_tokens": False,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: Any = json.load(response)
    entries = answer["choices"][0]["logprobs"]["content"]
    return [int(entry["token"].removeprefix("token_id:")) for entry in entries], [e["logprob"] for e in entries]


@pytest.mark.parametrize("family", WRITERS)
def test_an_exported_model_answers_as_ours(workers: PoolKeeper, tmp_path: Path, family: str) -> None:
    image = write_image(tmp_path / "image.png", IMAGE_SIZES[family])
    hf_dir = WRITERS[family](tmp_path / "model")
    _sharpen(hf_dir)
    native, exported = str(tmp_path / "native"), tmp_path / "exported"
    succeed(workers, 1, ["convert", "import", "--hf-dir", str(hf_dir), "--out", native])
    succeed(workers, 1, ["convert", "export", "--checkpoint", native, "--hf-dir", str(hf_dir), "--out", str(exported)])
    [(tokens, logprobs)] = workers(1).run(
        cases.answer_with_logprobs,
        hf_dir=str(hf_dir),
        checkpoint=native,
        question=QUESTION,
        image=str(image),
        num_tokens=NUM_TOKENS,
    )
    with served(exported, tmp_path / "vllm.log") as port:
        served_tokens, served_logprobs = chat(port, image, begins_with_token=family == "llava")
    worst = max(abs(one - other) for one, other in zip(logprobs, served_logprobs, strict=False))
    equal = sum(one == other for one, other in zip(tokens, served_tokens, strict=False))
    rows = [
        row(f"{family}: greedy tokens of an image chat, equal", equal, unit=f"of {len(tokens)}",
            required=f"{len(tokens)}", reference="vLLM on the CPU, fp32", command="make test-serve"),
        row(f"{family}: log probability of a token", worst, unit="largest difference",
            required=f"<= {LOGPROB_LIMIT:g}", reference="vLLM on the CPU, fp32", command="make test-serve"),
    ]  # fmt: skip
    record("serve", rows)
    assert len(tokens) > 1 and served_tokens == tokens
    assert worst <= LOGPROB_LIMIT

"""Directories with FP8 weights: what is written, number by number, and what transformers makes of it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.running import call
from tests.pool import PoolKeeper
from tests.tiny import write_tiny_qwen3vl, write_tiny_qwen3vl_moe

# Key and value projections have 64 rows: no multiple of 128, so they stay as they are.
TEXT = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
NUM_LAYERS = 3


def convert(workers: PoolKeeper, *words: str) -> tuple[int, str]:
    ((code, _out, err),) = workers(1).run(call, words=["convert", *words], timeout_s=300)
    return code, err


@pytest.fixture(scope="module")
def exported(workers: PoolKeeper, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fp8")
    source = write_tiny_qwen3vl(
        root / "source", num_layers=NUM_LAYERS, text_changes=TEXT, vision_changes={"out_hidden_size": 256}
    )
    code, err = convert(workers, "import", "--hf-dir", str(source), "--out", str(root / "native"))
    assert code == 0, err
    for dtype in ("fp8", "bfloat16"):
        words = ["--checkpoint", str(root / "native"), "--hf-dir", str(source), "--out", str(root / dtype)]
        code, err = convert(workers, "export", *words, "--dtype", dtype)
        assert code == 0, err
    return {name: root / name for name in ("source", "native", "fp8", "bfloat16")}


def fp8_modules() -> set[str]:
    four = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return {f"model.language_model.layers.{layer}.{name}" for layer in range(NUM_LAYERS) for name in four}


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """By hand: each block times a power of two that brings its largest number to 448 or below, to E4M3 and back."""
    result = torch.empty_like(weight)
    for top in range(0, weight.shape[0], 128):
        for left in range(0, weight.shape[1], 128):
            block = weight[top : top + 128, left : left + 128]
            scale = 2.0 ** math.floor(math.log2(448 / float(block.abs().max())))
            result[top : top + 128, left : left + 128] = (block * scale).to(torch.float8_e4m3fn).float() / scale
    return result


def test_each_number_is_the_nearest_of_its_block(exported: dict[str, Path]) -> None:
    source, written = (
        load_file(exported["source"] / "model.safetensors"),
        load_file(exported["fp8"] / "model.safetensors"),
    )
    in_fp8 = {name.removesuffix(".weight") for name, one in written.items() if one.dtype == torch.float8_e4m3fn}
    assert in_fp8 == fp8_modules()
    assert set(written) == set(source) | {f"{name}.weight_scale_inv" for name in in_fp8}
    for name, weight in source.items():
        if name.removesuffix(".weight") not in in_fp8:
            assert torch.equal(written[name], weight.bfloat16()), name
            continue
        scales = written[f"{name}_scale_inv"]
        assert scales.dtype == torch.float32 and scales.shape == (weight.shape[0] // 128, weight.shape[1] // 128)
        whole = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert torch.equal(written[name].float() * whole, rounded(weight)), name


def test_it_is_smaller_and_says_what_it_is(exported: dict[str, Path]) -> None:
    config = json.loads((exported["fp8"] / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8" and config["weight_block_size"] == [128, 128]
    skipped = set(config["modules_to_not_convert"])
    assert not skipped & fp8_modules()
    assert {"model.language_model.layers.0.self_attn.k_proj", "model.visual.blocks.0.attn.qkv"} <= skipped
    sizes = [(exported[name] / "model.safetensors").stat().st_size for name in ("fp8", "bfloat16")]
    assert sizes[0] < sizes[1]


def test_transformers_loads_it(exported: dict[str, Path]) -> None:
    """Without a GPU it dequantises: to the numbers that were written, in bf16, which holds them exactly."""
    from transformers import AutoModelForImageTextToText

    source = load_file(exported["source"] / "model.safetensors")
    model: Any = AutoModelForImageTextToText.from_pretrained(exported["fp8"], dtype=torch.bfloat16)
    state = model.state_dict()
    for name in fp8_modules():
        assert torch.equal(state[f"{name}.weight"].float(), rounded(source[f"{name}.weight"])), name
    plain: Any = AutoModelForImageTextToText.from_pretrained(exported["bfloat16"], dtype=torch.bfloat16)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits, expected = model(input_ids=tokens).logits.float(), plain(input_ids=tokens).logits.float()
    distance = float((logits - expected).norm() / expected.norm())
    assert 1e-3 < distance < 0.1  # it is FP8, and the same model


def test_mixtures_are_refused(workers: PoolKeeper, tmp_path: Path) -> None:
    source = write_tiny_qwen3vl_moe(tmp_path / "source")
    assert convert(workers, "import", "--hf-dir", str(source), "--out", str(tmp_path / "native"))[0] == 0
    words = ["--checkpoint", str(tmp_path / "native"), "--hf-dir", str(source), "--out", str(tmp_path / "out")]
    code, err = convert(workers, "export", *words, "--dtype", "fp8")
    assert code == 2 and "mixture of experts" in err and not (tmp_path / "out").exists()


def test_sides_that_are_no_blocks_are_refused(workers: PoolKeeper, tmp_path: Path) -> None:
    source = write_tiny_qwen3vl(tmp_path / "source")
    assert convert(workers, "import", "--hf-dir", str(source), "--out", str(tmp_path / "native"))[0] == 0
    words = ["--checkpoint", str(tmp_path / "native"), "--hf-dir", str(source), "--out", str(tmp_path / "out")]
    code, err = convert(workers, "export", *words, "--dtype", "fp8")
    assert code == 2 and "multiples of 128" in err


def test_it_is_not_taken_for_weights_to_train(workers: PoolKeeper, exported: dict[str, Path], tmp_path: Path) -> None:
    code, err = convert(workers, "import", "--hf-dir", str(exported["fp8"]), "--out", str(tmp_path / "again"))
    assert code == 2 and "weight_scale_inv" in err and "left over" in err

"""How fast a model of about a billion weights trains: tokens/s, images/s, MFU. Reported, never a condition."""

import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megavlm.config.precision import Fp8Config
from megavlm.config.schema import (
    DataConfig,
    ModelConfig,
    ObserveConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    TrainConfig,
)
from megavlm.planner.hardware import PRESETS
from tests.gpu.conftest import GpuWorkers, need
from tests.invariant.layouts import layout
from tests.tiny import write_tiny_qwen3vl

pytestmark = pytest.mark.gpu

NUM_ROWS, IMAGE_PX, NUM_WORDS, MICRO_BATCH_SIZE = 64, 448, 200, 8
NUM_WARM_UP, NUM_STEPS = 3, 10
# Dense BF16 matrix products of one GPU, by what its name contains. H200 computes as H100 does (NVIDIA data sheets).
PEAK_FLOPS_PER_S = {
    "H100": PRESETS["h100"].peak_flops_per_s,
    "H200": PRESETS["h100"].peak_flops_per_s,
    "B200": PRESETS["b200"].peak_flops_per_s,
    "A100": 312e12,
}
CASES = [("torch", "bf16"), ("flash", "bf16"), ("te", "bf16"), ("te", "fp8")]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one GPU": (1, {}),
    "DP2": (2, {}),
    "TP2+SP": (2, layout(tp=2, sp=True)),
    "PP2, encoder in bubbles": (2, layout(pp=2, placement="bubble")),
    "DP8": (8, {}),
    "TP2+SP x PP2 x DP2": (8, layout(tp=2, sp=True, pp=2)),
    "TP2+SP x PP2 x DP2, encoder in bubbles": (8, layout(tp=2, sp=True, pp=2, placement="bubble")),
}


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL of about a billion random weights, and rows that all cost the same."""
    root = tmp_path_factory.mktemp("throughput")
    section = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    write_tiny_qwen3vl(
        root / "model",
        num_layers=16,
        num_kv_heads=8,
        dtype=torch.bfloat16,
        text_changes={
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_attention_heads": 16,
            "head_dim": 128,
            "rope_parameters": section,
        },
        vision_changes={
            "depth": 16,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [4, 8, 12],
        },
    )
    random, rows = np.random.RandomState(0), []
    for number in range(NUM_ROWS):
        pixels = random.randint(0, 256, (IMAGE_PX, IMAGE_PX, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
        answer = {"role": "assistant", "content": "red " * NUM_WORDS}
        turns = [{"role": "user", "content": "<image>what is this?"}, answer]
        rows.append(json.dumps({"messages": turns, "images": [f"{number}.png"]}))
    (root / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return root


@pytest.mark.parametrize("place", LAYOUTS)
@pytest.mark.parametrize(("backend", "precision"), CASES)
def test_throughput(
    backend: str,
    precision: Any,
    place: str,
    workload: Path,
    gpu_workers: GpuWorkers,
    record_property: Callable[[str, object], None],
) -> None:
    need(backend)
    num_gpus, parallel = LAYOUTS[place]
    pool = gpu_workers(num_gpus)
    recipe = Recipe(
        name="throughput",
        output_dir=str(workload / "runs"),
        model=ModelConfig(hf_dir=str(workload / "model"), backend=typing.cast(Any, backend)),
        parallel=ParallelConfig(**parallel),
        data=DataConfig(train=(str(workload / "rows.jsonl"),), max_pixels=IMAGE_PX**2, min_pixels=IMAGE_PX**2),
        train=TrainConfig(
            train_iters=NUM_WARM_UP + NUM_STEPS,
            precision=precision,
            micro_batch_size=MICRO_BATCH_SIZE,
            global_batch_size=MICRO_BATCH_SIZE * 4 * num_gpus,
        ),
        optimizer=OptimizerConfig(lr=1e-5),
        fp8=Fp8Config(aligner_fp8_recipe="none") if precision == "fp8" else Fp8Config(),
        observe=ObserveConfig(tensorboard=False, progress=False, report=False),
    )
    measured, *_ = pool.run(
        "tests.gpu.cases:throughput", timeout_s=900, recipe=recipe, num_warm_up=NUM_WARM_UP, num_steps=NUM_STEPS
    )
    peak = next((peak for name, peak in PEAK_FLOPS_PER_S.items() if name in torch.cuda.get_device_name(0)), None)
    row = {
        "name": f"{backend}, {precision}, {place}",
        "num_gpus": num_gpus,
        "tokens_per_s": measured["tokens_per_s"],
        "images_per_s": measured["images_per_s"],
        "step_s": measured["step_s"],
        "mfu": None if peak is None else measured["flops_per_s"] / peak / num_gpus,
    }
    record_property("throughput", row)
    assert measured["tokens_per_s"] > 0 and measured["images_per_s"] > 0

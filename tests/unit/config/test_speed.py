"""Knobs of memory and speed: what goes together."""

import dataclasses
from typing import Any

import pytest

from megavlm.config.numerics import row_multiples
from megavlm.config.peft import PeftConfig
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
from megavlm.config.speed import check_speed
from megavlm.errors import UseError

OFFLOADED: dict[str, Any] = {"parallel": ParallelConfig(optimizer_cpu_offload=True)}
OVERLAPPED: dict[str, Any] = {
    "model": ModelConfig(backend="te"),
    "parallel": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, tp_comm_overlap=True),
    "data": DataConfig(packing=True, packing_length=100, max_length=64, pad_to_packing_length=True),
    "observe": ObserveConfig(num_report_samples=0),
}


def parallel_of(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Sections with changes of the layout."""
    return base | {"parallel": dataclasses.replace(base["parallel"], **changes)}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        OFFLOADED,
        parallel_of(OFFLOADED, optimizer_offload_fraction=0.5, overlap_cpu_optimizer_d2h_h2d=True),
        OFFLOADED | {"train": TrainConfig(precision="fp8"), "model": ModelConfig(backend="te")},
        OVERLAPPED,
        OVERLAPPED | {"observe": ObserveConfig()},  # no held-out rows, no answers
        parallel_of(OVERLAPPED, context_parallel_size=2, vision_placement="stage", pipeline_model_parallel_size=2),
    ],
)
def test_what_goes_together(sections: dict[str, Any]) -> None:
    check_speed(Recipe(**sections))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (parallel_of(OFFLOADED, optimizer_offload_fraction=0.0), "optimizer_offload_fraction: got 0.0"),
        (parallel_of(OFFLOADED, optimizer_offload_fraction=1.5), "optimizer_offload_fraction: got 1.5"),
        (parallel_of(OFFLOADED, use_distributed_optimizer=False), "use_distributed_optimizer false"),
        (OFFLOADED | {"train": TrainConfig(precision="fp32")}, "true with train.precision fp32"),
        (OFFLOADED | {"train": TrainConfig(precision="fp16")}, "true with train.precision fp16"),
        (OFFLOADED | {"fp8": Fp8Config(fp8_param_gather=True)}, "true with fp8.fp8_param_gather"),
        (OFFLOADED | {"optimizer": OptimizerConfig(unfreeze="0: projector; 0.5: language")}, "optimizer.unfreeze"),
        ({"parallel": ParallelConfig(optimizer_offload_fraction=0.5)}, "0.5 without optimizer_cpu_offload"),
        ({"parallel": ParallelConfig(overlap_cpu_optimizer_d2h_h2d=True)}, "without optimizer_cpu_offload"),
        (OVERLAPPED | {"model": ModelConfig(backend="torch")}, "model.backend torch"),
        (parallel_of(OVERLAPPED, tensor_model_parallel_size=1), "tensor_model_parallel_size 1"),
        (parallel_of(OVERLAPPED, sequence_parallel=False), "sequence_parallel false"),
        (parallel_of(OVERLAPPED, vision_placement="own_ranks"), "vision_placement own_ranks"),
        (OVERLAPPED | {"data": DataConfig(packing=True)}, "data.pad_to_packing_length false"),
        (OVERLAPPED | {"peft": PeftConfig(tuner_type="lora")}, "true with peft"),
        (
            OVERLAPPED | {"train": TrainConfig(precision="fp8"), "fp8": Fp8Config(first_last_layers_bf16=True)},
            "true with fp8.first_last_layers_bf16",
        ),
        (
            OVERLAPPED
            | {"observe": ObserveConfig(), "data": dataclasses.replace(OVERLAPPED["data"], eval=("held_out.jsonl",))},
            "observe.num_report_samples 4",
        ),
    ],
)
def test_what_does_not(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UseError, match=message):
        check_speed(Recipe(**sections))


def test_rows_of_one_length_are_as_long_as_the_layout_needs() -> None:
    assert row_multiples(Recipe(**OVERLAPPED)) == (1, 100)
    assert row_multiples(Recipe(**parallel_of(OVERLAPPED, context_parallel_size=2))) == (4, 104)
    data = DataConfig(packing=True, max_length=64, pad_to_packing_length=True)
    assert row_multiples(Recipe(**OVERLAPPED | {"data": data})) == (1, 64)

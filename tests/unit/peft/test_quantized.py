"""Weights in 4 bits are bitsandbytes' own, whatever part of them a rank holds."""

from pathlib import Path

import pytest

from tests.pool import PoolKeeper, WorkerError
from tests.tiny import write_tiny_qwen3vl, write_tiny_qwen3vl_moe
from tests.unit.peft import quantized_cases

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {"one process": {}, "TP2+SP": TP2, "PP2": {"pipeline_model_parallel_size": 2}}


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # wide enough for several groups of scales in a tensor
    sizes = {"intermediate_size": 512}
    return write_tiny_qwen3vl(tmp_path_factory.mktemp("quantized") / "model", text_changes=sizes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("double", [True, False])
def test_values_are_those_of_the_whole(workers: PoolKeeper, hf_dir: Path, layout: str, double: bool) -> None:
    peft = {"tuner_type": "lora", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    ranks = workers(2 if LAYOUTS[layout] else 1).run(
        quantized_cases.compare_with_bitsandbytes, hf_dir=hf_dir, peft=peft, parallel=LAYOUTS[layout]
    )
    assert [rank["different"] for rank in ranks] == [[]] * len(ranks)
    held = {name for rank in ranks for name in rank["names"]}
    assert len(held) == 4 * 4 and all(name.startswith("language.decoder.layers.") for name in held)
    if double:  # 4 bits and an eighth, of 32; what is kept for each row weighs more in so small a matrix
        assert all(rank["bytes"] < 0.2 * rank["full bytes"] for rank in ranks)


def test_experts_and_towers(workers: PoolKeeper, tmp_path: Path) -> None:
    sizes = {"moe_intermediate_size": 128}
    hf_dir = write_tiny_qwen3vl_moe(tmp_path / "model", text_changes=sizes, vision_changes={"hidden_size": 64})
    peft = {
        "components": "vision: lora, projector: full, language: lora",
        "bnb_4bit_quant_type": "fp4",
        "quantized_components": ("vision", "projector", "language"),
    }
    ranks = workers(2).run(
        quantized_cases.compare_with_bitsandbytes,
        hf_dir=hf_dir,
        peft=peft,
        parallel={"tensor_model_parallel_size": 1, "expert_model_parallel_size": 2},
    )
    assert [rank["different"] for rank in ranks] == [[], []]
    held = {name for rank in ranks for name in rank["names"]}
    assert {name.split(".")[0] for name in held} == {"vision", "language"}  # a projector that learns is a matrix
    assert {name.split(".")[7] for name in held if ".local_experts." in name} == {"0", "1", "2", "3"}


def test_blocks_are_not_cut(workers: PoolKeeper, hf_dir: Path) -> None:
    peft = {"tuner_type": "lora", "bnb_4bit_quant_type": "nf4"}
    with pytest.raises(WorkerError, match="a multiple of 256 inputs: blocks of 64 values are not cut"):
        workers(4).run(
            quantized_cases.compare_with_bitsandbytes,
            hf_dir=hf_dir,
            peft=peft,
            parallel={"tensor_model_parallel_size": 4},
        )

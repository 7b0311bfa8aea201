"""A recorded step of every placement: its timeline, and the report that shows it."""

from pathlib import Path

import pytest

from megavlm.observe.timeline import read_timeline
from tests.distributed.running import Inputs, succeed
from tests.pool import PoolKeeper

PLACEMENTS: dict[str, tuple[int, list[str]]] = {
    "first_stage": (2, ["parallel.pipeline_model_parallel_size=2"]),
    "stage": (2, ["parallel.pipeline_model_parallel_size=2"]),
    "spread": (4, ["parallel.pipeline_model_parallel_size=2"]),
    "bubble": (2, ["parallel.pipeline_model_parallel_size=2"]),
    "own_ranks": (3, ["parallel.pipeline_model_parallel_size=2"]),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_timeline_of_a_placement(inputs: Inputs, workers: PoolKeeper, tmp_path: Path, placement: str) -> None:
    num_processes, layout = PLACEMENTS[placement]
    words = inputs.train(tmp_path, *layout, f"parallel.vision_placement={placement}")
    words += ["train.train_iters=2", "observe.timeline_step=2", "observe.report=true", "observe.num_report_samples=0"]
    succeed(workers, num_processes, words)
    timeline = read_timeline(tmp_path / "run" / "timeline.json")
    assert (timeline.step, timeline.placement) == (2, placement)
    assert timeline.simulated is not None
    expected = {"first_stage": 2, "stage": 2, "spread": 2, "bubble": 2, "own_ranks": 3}[placement]
    assert len(timeline.measured.ranks) == len(timeline.simulated.ranks) == expected
    for measured, simulated in zip(timeline.measured.ranks, timeline.simulated.ranks, strict=True):
        done = [(event.kind, event.microbatch) for event in measured if event.kind in ("F", "B", "EF", "EB")]
        assert done == [(event.kind, event.microbatch) for event in simulated if event.kind in ("F", "B", "EF", "EB")]
        assert measured[-1].kind == "reduce"
    assert "timeline" in (tmp_path / "run" / "report.html").read_text()

"""The report of GPU checks: what it holds, and what it says on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megavlm.errors import UseError
from megavlm.observe.gpu_report import Check, Figure, GpuReport, Throughput, read_gpu_report, write_gpu_report
from megavlm.platform.capabilities import probe
from tests.invariant import canon
from tests.pool import REPO_DIR, PoolKeeper
from tests.tiny import write_tiny_qwen3vl

REPORT = GpuReport(
    machine={"GPUs": "2 x H100 <80 GiB>", "torch": "2.13.0"},
    checks=(
        Check("layouts", "TP2+SP", "passed", figures=(Figure("loss", 2.5e-7, 1e-5), Figure("step, s", 0.5))),
        Check("layouts", "PP2", "failed", "above the limit: {'loss': 0.1}", (Figure("loss", 0.1, 1e-5),)),
        Check("backends", "te", "skipped", "transformer-engine: not installed"),
    ),
    throughput=(
        Throughput("te, bf16, DP2", 2, 123456.0, 78.9, 0.25, 0.412),
        Throughput("torch, bf16, DP2", 2, 1000.0, 7.0, 2.5, None),
    ),
    written="2026-01-02 03:04",
)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    json_path, _ = write_gpu_report(REPORT, tmp_path / "new")
    assert read_gpu_report(json_path) == REPORT
    assert json.loads(json_path.read_text())["throughput"][0]["tokens_per_s"] == 123456.0


def test_the_page_shows_outcomes_figures_and_reasons(tmp_path: Path) -> None:
    _, page = write_gpu_report(REPORT, tmp_path)
    text = page.read_text()
    for part in (
        "2 x H100 &lt;80 GiB&gt;",
        "loss 2.5e-07 (1e-05)",
        "step, s 0.5<",
        "above the limit: {&#39;loss&#39;: 0.1}",
        "transformer-engine: not installed",
        "123,456",
        "41.2%",
        "peak not known",
        "<dt>failed</dt><dd>1</dd>",
        "2026-01-02 03:04",
    ):
        assert part in text, part
    assert "Nothing was run" not in text and "http://" not in text and "https://" not in text


@pytest.mark.parametrize("content", ["{", "{}", '{"machine": {}, "checks": [{"section": 1}], "throughput": []}'])
def test_a_damaged_file_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "gpu_report.json"
    path.write_text(content)
    with pytest.raises(UseError, match="gpu_check"):
        read_gpu_report(path)


@pytest.mark.skipif(probe("cuda").available, reason="this machine has a GPU")
def test_without_a_gpu_everything_is_skipped_and_says_why(tmp_path: Path) -> None:
    script = REPO_DIR / "examples" / "gpu_check.sh"
    done = subprocess.run(
        [str(script), str(tmp_path / "out"), "-k", "first_step"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = read_gpu_report(tmp_path / "out" / "gpu_report.json")
    assert report.no_gpu == probe("cuda").detail
    assert report.checks and {check.outcome for check in report.checks} == {"skipped"}
    assert all(check.reason == f"no GPU: {report.no_gpu}" for check in report.checks)
    assert set(report.sections) == {"parity", "layouts"}
    assert "Nothing was run" in (tmp_path / "out" / "gpu_report.html").read_text()


def test_throughput_counts_what_a_step_trains(workers: PoolKeeper, tmp_path: Path) -> None:
    """The case that GPUs run, on the CPU: tokens, images and FLOPs of a step over its time."""
    from megavlm.config.schema import DataConfig

    write_tiny_qwen3vl(tmp_path / "qwen3_vl")
    message = [{"role": "user", "content": "what is this?"}, {"role": "assistant", "content": "a red square"}]
    rows = "\n".join(json.dumps({"messages": message}) for _ in range(8))
    (tmp_path / "rows.jsonl").write_text(rows + "\n")
    recipe = canon.recipe(tmp_path)
    assert recipe.data == DataConfig(train=(str(tmp_path / "rows.jsonl"),))
    (measured,) = workers(1).run("tests.gpu.cases:throughput", recipe=recipe, num_warm_up=1, num_steps=3)
    assert measured["images_per_s"] == 0
    num_tokens = measured["tokens_per_s"] * measured["step_s"]
    assert num_tokens == pytest.approx(8 * round(num_tokens / 8)) and num_tokens > 8 * 5
    # two FLOPs for each weight of the 4 layers and of the output, forward and twice that backward, and attention's
    weights = 4 * (64 * (8 + 2 * 2) * 16 + 8 * 16 * 64 + 3 * 64 * 128) + 64 * 512
    flops = measured["flops_per_s"] * measured["step_s"] / (3 * num_tokens)
    assert 2 * weights < flops < 2.2 * weights

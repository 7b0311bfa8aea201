"""One page about several runs, each of which starts from the one before: a chapter for each, in their order."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import megavlm
from megavlm.observe.charts import Chart
from megavlm.observe.files import replace_text
from megavlm.observe.metrics import LOG_NAME, read_log
from megavlm.observe.report import RECIPE_NAME, SAMPLES_NAME, read_recipe
from megavlm.observe.report_charts import build_charts
from megavlm.observe.report_html import render
from megavlm.observe.report_samples import ShownSample, read_samples
from megavlm.observe.report_summary import Fact, Headline, list_alerts, list_facts, list_headlines, started_at

NUM_SAMPLES = 4
"""Samples of a chapter that are shown; the page of the run has all."""
_CHARTS = ("loss", "held-out")


@dataclass(frozen=True)
class Chapter:
    """What the page says of a run.

    Attributes:
        name: of the run.
        description: what its recipe says that it is for.
        headlines: results, before and after.
        facts: how much was done, how fast, on which layout.
        alerts: what a reader must know first.
        charts: loss, and what held-out rows say beside it.
        samples: some held-out ones.
    """

    name: str
    description: str
    headlines: list[Headline]
    facts: list[Fact]
    alerts: list[str]
    charts: list[Chart]
    samples: list[ShownSample]


def write_runs_report(run_dirs: Sequence[str | Path], out: str | Path, title: str) -> Path:
    """Write one page about several runs, from what each left in its folder, and return its path.

    Args:
        run_dirs: folders of the runs, in the order of the page; each has a `metrics.jsonl`, and where they are there
            `recipe.yaml` and `samples.json` (see `report.write_report`).
        out: the file to write; its folder is made when missing.
        title: of the page.

    Raises:
        UseError: a folder has no log, or a file there is damaged.
        RunError: the page cannot be written.
    """
    logs = [read_log(Path(folder) / LOG_NAME) for folder in run_dirs]
    page = render(
        "report_runs.html.j2",
        title=title,
        started=started_at(logs[0]),
        chapters=[_chapter(Path(folder), rows) for folder, rows in zip(run_dirs, logs, strict=True)],
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=megavlm.__version__,
    )
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    return replace_text(target, page)


def _chapter(folder: Path, rows: list[dict[str, Any]]) -> Chapter:
    recipe = read_recipe(folder / RECIPE_NAME)
    samples = read_samples(folder / SAMPLES_NAME)
    return Chapter(
        name=recipe.name or folder.resolve().name,
        description=recipe.description,
        headlines=list_headlines(rows, samples),
        facts=list_facts(rows, recipe.tree),
        alerts=list_alerts(rows),
        charts=[chart for chart in build_charts(rows, recipe.stage) if chart.name in _CHARTS],
        samples=_spread(samples),
    )


def _spread(samples: list[ShownSample]) -> list[ShownSample]:
    """Some of the samples, from all over them."""
    number = min(NUM_SAMPLES, len(samples))
    return [samples[index * len(samples) // number] for index in range(number)]

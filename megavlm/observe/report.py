"""The report of a run: one HTML file that opens anywhere, without a network."""

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

import megavlm
from megavlm.observe.files import replace_text
from megavlm.observe.metrics import LOG_NAME, read_log
from megavlm.observe.report_charts import build_charts
from megavlm.observe.report_html import render
from megavlm.observe.report_samples import read_samples
from megavlm.observe.report_summary import (
    list_alerts,
    list_events,
    list_facts,
    list_headlines,
    list_settings,
    started_at,
)
from megavlm.observe.timeline import TIMELINE_NAME, read_timeline
from megavlm.observe.timeline_html import TimelineView, build_timeline_view

REPORT_NAME = "report.html"
RECIPE_NAME = "recipe.yaml"
SAMPLES_NAME = "samples.json"


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html` from what the run left there, and return its path.

    Reads `metrics.jsonl` (required), `recipe.yaml`, `samples.json` and `timeline.json` (each may be missing; `timeline`
    describes the last). samples.json is a list of
    `{"id", "images": [paths], "question", "truth", "before", "after", "task"}`, where image paths are absolute or
    relative to the run folder, `before` and `after` are answers or null, and `task` may be missing.

    Raises:
        UseError: there is no log, or a file there is damaged.
        RunError: the report cannot be written.
    """
    folder = Path(run_dir)
    rows = read_log(folder / LOG_NAME)
    recipe = read_recipe(folder / RECIPE_NAME)
    samples = read_samples(folder / SAMPLES_NAME)
    page = render(
        name=recipe.name or folder.resolve().name,
        description=recipe.description,
        started=started_at(rows),
        headlines=list_headlines(rows, samples),
        facts=list_facts(rows, recipe.tree),
        alerts=list_alerts(rows),
        charts=build_charts(rows, recipe.stage),
        timeline=_timeline_view(folder / TIMELINE_NAME),
        samples=samples,
        events=list_events(rows),
        settings=list_settings(rows),
        recipe_text=recipe.text,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=megavlm.__version__,
    )
    return replace_text(folder / REPORT_NAME, page)


def _timeline_view(path: Path) -> TimelineView | None:
    """None where no step was recorded."""
    return build_timeline_view(read_timeline(path)) if path.exists() else None


@dataclass(frozen=True)
class RecordedRecipe:
    """The recipe that a run has left beside its log, as far as a page reads it; its text is shown whatever it holds."""

    text: str
    tree: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the run; empty where nothing says it."""
        return str(self.tree.get("name") or "")

    @property
    def description(self) -> str:
        """What the run is for."""
        return str(self.tree.get("description") or "")

    @property
    def stage(self) -> str:
        """Training method."""
        train = self.tree.get("train")
        return str(train.get("stage", "sft")) if isinstance(train, dict) else "sft"


def read_recipe(path: Path) -> RecordedRecipe:
    """The recipe of a run; an empty one where there is no file, or one that is no recipe."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        tree = None
    return RecordedRecipe(text, tree if isinstance(tree, dict) else {})

"""The report of a run: one HTML file that opens anywhere, without a network."""

from datetime import datetime, timezone
from pathlib import Path

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
    recipe_text = _read_text(folder / RECIPE_NAME)
    recipe = _parse_recipe(recipe_text)
    samples = read_samples(folder / SAMPLES_NAME)
    page = render(
        name=str(recipe.get("name") or folder.resolve().name),
        started=started_at(rows),
        headlines=list_headlines(rows, samples),
        facts=list_facts(rows, recipe),
        alerts=list_alerts(rows),
        charts=build_charts(rows),
        timeline=_timeline_view(folder / TIMELINE_NAME),
        samples=samples,
        events=list_events(rows),
        settings=list_settings(rows),
        recipe_text=recipe_text,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=megavlm.__version__,
    )
    return replace_text(folder / REPORT_NAME, page)


def _timeline_view(path: Path) -> TimelineView | None:
    """None where no step was recorded."""
    return build_timeline_view(read_timeline(path)) if path.exists() else None


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _parse_recipe(text: str) -> dict:
    """The recipe as a mapping, for the name and the layout only; its text is shown whatever it holds."""
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return recipe if isinstance(recipe, dict) else {}

"""Pages about rows: as the model sees them, and what is in them. One file each, which needs no network."""

import time
from collections.abc import Sequence

from megavlm import __version__
from megavlm.data.inspect.preview import ShownRow
from megavlm.data.inspect.stats import Stats
from megavlm.observe.report_html import render


def preview_page(title: str, rows: Sequence[ShownRow]) -> str:
    """The page of `megavlm data preview`.

    Args:
        title: what the rows are of.
        rows: in the order of the page.
    """
    return render("data_preview.html.j2", title=title, rows=rows, written=_now(), version=__version__)


def stats_page(title: str, stats: Stats) -> str:
    """The page of `megavlm data stats`.

    Args:
        title: what the rows are of.
        stats: of them.
    """
    return render("data_stats.html.j2", title=title, stats=stats, written=_now(), version=__version__)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M")

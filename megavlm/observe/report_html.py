"""A report as one HTML page: the template, its style sheet and its script, put together."""

import re
from pathlib import Path
from typing import Any

import jinja2

_FOLDER = Path(__file__).parent
_TEMPLATE = "report.html.j2"


def render(template: str = _TEMPLATE, **parts: Any) -> str:
    """The page of a template, by default for what `report.write_report` gathered; every text in `parts` is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["dotted"] = _dotted
    return environment.get_template(template).render(**parts)


def _dotted(path: str) -> str:
    """A path with every corner as a dot: a line without a length, which round ends make visible."""
    return re.sub(r"[ML]([^MLh]+)(?:h0)?", r"M\1h0", path)

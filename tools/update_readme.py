"""Fills README.md with what was measured: the rows of docs/evidence/*.json, between markers.

    python tools/update_readme.py          write README.md
    python tools/update_readme.py --check  write nothing; exit 1 when README.md does not say what the files say

A marked place in README.md is `<!-- evidence:TOPIC -->` to `<!-- /evidence -->`, each on a line of its own; TOPIC names
docs/evidence/TOPIC.json, a list of rows with the keys of `ROW_KEYS`. Of a topic with many rows the README has the worst
of each kind, and a link to docs/evidence/TOPIC.md, which has all. Nobody edits between the markers by hand.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

REPO_DIR = Path(__file__).resolve().parents[1]

ROW_KEYS = ("name", "value", "unit", "required", "reference", "reference_value", "command", "date", "machine")
COLUMNS = {
    "name": "What",
    "value": "Measured",
    "unit": "Unit",
    "required": "Required",
    "reference": "Compared with",
    "reference_value": "Its value",
}
MOST_COLUMNS = 5
MOST_ROWS = 40
NOT_MEASURED = "*Not measured yet.*"

_PLACE = re.compile(r"(?ms)^<!-- evidence:([\w-]+) -->\n(.*?)^<!-- /evidence -->$")


class EvidenceError(ValueError):
    """A file of evidence, or a marker in the README, that is not as described above."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one topic; empty when nothing was measured yet.

    Raises:
        EvidenceError: the file is no JSON list of rows with exactly the keys of `ROW_KEYS`.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise EvidenceError(f"{path}: not JSON: {error}") from error
    if not isinstance(rows, list):
        raise EvidenceError(f"{path}: got {type(rows).__name__}; expected a list of rows")
    for number, row in enumerate(rows, start=1):
        keys = set(row) if isinstance(row, dict) else set()
        if keys != set(ROW_KEYS):
            missing, unknown = sorted(set(ROW_KEYS) - keys), sorted(keys - set(ROW_KEYS))
            raise EvidenceError(f"{path} row {number}: missing keys {missing}, unknown keys {unknown}")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of the rows, without columns that are empty in all of them, and where the figures come from."""
    if not rows:
        return NOT_MEASURED + "\n"
    keys = [key for key in COLUMNS if any(_cell(row[key]) for row in rows)]
    lines = [_line([COLUMNS[key] for key in keys]), _line(["---"] * len(keys))]
    lines += [_line([_cell(row[key]) for key in keys]) for row in rows]
    return "\n".join(lines + _origins(rows)) + "\n"


def compact(rows: list[dict[str, Any]]) -> str:
    """One line for each subject, where rows are named `subject: measure` and several subjects share measures."""
    if not rows:
        return table(rows)
    named = [(*row["name"].rpartition(": ")[::2], row) for row in rows]
    measures = dict.fromkeys(measure for _, measure, _ in named)
    subjects = dict.fromkeys(subject for subject, _, _ in named)
    if "" in subjects or len(measures) > MOST_COLUMNS or len(subjects) < 2 * len(measures):
        return table(rows)
    required = {measure: row["required"] for _, measure, row in named}
    heads = [measure + (f" ({required[measure]})" if required[measure] else "") for measure in measures]
    values = {(subject, measure): _cell(row["value"]) for subject, measure, row in named}
    lines = [_line(["What", *heads]), _line(["---"] * (len(heads) + 1))]
    for subject in subjects:
        lines.append(_line([_cell(subject), *(values.get((subject, measure), "") for measure in measures)]))
    return "\n".join(lines + _origins(rows)) + "\n"


def summary(rows: list[dict[str, Any]], topic: str) -> str:
    """Of rows with a bound, by unit and bound: how many they are, and the one nearest to it; the rest by a link."""
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["required"]:
            unit = re.sub(r"\d+", "n", _cell(row["unit"]))  # `of 12 tensors` and `of 13 tensors` are of one kind
            kinds.setdefault((unit, _cell(row["required"])), []).append(row)
    heads = ["Nearest to its bound", "Measured", "Unit", "Required", "Figures of this kind"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for (_unit, required), alike in kinds.items():
        nearest = (min if required.startswith(">") else max)(alike, key=lambda row: float(row["value"]))
        shown = [_cell(nearest[key]) for key in ("name", "value", "unit", "required")]
        lines.append(_line([*shown, str(len(alike))]))
    lines += ["", f"All {len(rows)} figures: [docs/evidence/{topic}.md](docs/evidence/{topic}.md)."]
    return "\n".join(lines + _origins(rows)) + "\n"


def _origins(rows: list[dict[str, Any]]) -> list[str]:
    origins = dict.fromkeys((row["command"], row["date"], row["machine"]) for row in rows)
    return [""] + [f"Measured by `{command}` on {date} ({machine})." for command, date, machine in origins]


def fill(text: str, evidence_dir: Path) -> str:
    """The README's text with every marked place filled.

    Raises:
        EvidenceError: a marker without its partner, or a bad file of evidence.
    """

    def place(match: re.Match[str]) -> str:
        topic = match.group(1)
        rows = read_rows(evidence_dir / f"{topic}.json")
        shown = compact(rows) if len(rows) <= MOST_ROWS else summary(rows, topic)
        return f"<!-- evidence:{topic} -->\n{shown}<!-- /evidence -->"

    filled, num_places = _PLACE.subn(place, text)
    num_openings, num_closings = text.count("<!-- evidence:"), text.count("<!-- /evidence -->")
    if not num_places == num_openings == num_closings:
        raise EvidenceError(
            f"README.md: {num_openings} opening and {num_closings} closing markers, of which {num_places} pair up"
        )
    return filled


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Fill README.md with the measured figures of docs/evidence.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when README.md is out of date")
    parser.add_argument("--repo", type=Path, default=REPO_DIR, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    readme = options.repo / "README.md"
    text = readme.read_text(encoding="utf-8")
    try:
        filled = fill(text, options.repo / "docs" / "evidence")
    except EvidenceError as error:
        print(error, file=sys.stderr)
        return 2
    if options.check:
        if filled != text:
            print("README.md does not say what docs/evidence says; fix: python tools/update_readme.py", file=sys.stderr)
        return int(filled != text)
    if filled != text:
        readme.write_text(filled, encoding="utf-8")
    return 0


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())

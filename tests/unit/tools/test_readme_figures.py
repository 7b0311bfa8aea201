"""The figures in the README's sentences are those of the committed evidence."""

import json
import re
from pathlib import Path
from typing import Any

REPO_DIR = Path(__file__).resolve().parents[3]
README = (REPO_DIR / "README.md").read_text(encoding="utf-8")


def evidence(topic: str) -> list[dict[str, Any]]:
    return json.loads((REPO_DIR / "docs" / "evidence" / f"{topic}.json").read_text(encoding="utf-8"))


def said(pattern: str) -> tuple[str, ...]:
    found = re.search(pattern, README)
    assert found, f"README.md has no sentence like {pattern}"
    return found.groups()


def value(topic: str, name: str) -> float:
    (one,) = [float(row["value"]) for row in evidence(topic) if row["name"] == name]
    return one


def test_number_of_layouts() -> None:
    names = {row["name"].rsplit(":", 1)[0] for row in evidence("equivalence")}
    resumes = {name for name in names if name.startswith("resume")}
    assert said(r"<summary>(\d+) layouts and (\d+) resumes") == (str(len(names - resumes)), str(len(resumes)))


def test_worst_of_all_layouts() -> None:
    def worst(measure: str) -> str:
        return f"{max(row['value'] for row in evidence('equivalence') if row['name'].endswith(measure)):.1e}".replace(
            "e-0", "e-"
        )

    figures = said(r"loss (\S+) \(required: 1e-5\), gradient norm (\S+) \(1e-4\), drift (\S+) \(1e-6\)")
    assert figures == (worst(": loss"), worst(": gradient norm"), worst(": loss drift"))


def test_headline_of_the_places() -> None:
    models = {"ViT0.6B+7B": "16", "ViT0.6B+32B": "32", "ViT6B+20B": "16"}
    policies = (
        "A first stage, even layers, arrival order",
        "D spread",
        "E bubble, bound 8",
        "E bubble, bound 12, 2 chunks",
    )
    for policy in policies:
        figures = [
            f"{value('balance', f'{model}, {microbatches} microbatches: {policy}'):.2f}"
            for model, microbatches in models.items()
        ]
        assert f"| {' | '.join(figures)} |" in README, (policy, figures)

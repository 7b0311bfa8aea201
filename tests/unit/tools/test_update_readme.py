import json
from pathlib import Path
from typing import Any

import pytest

from tools.update_readme import NOT_MEASURED, EvidenceError, compact, fill, main, read_rows, table

README = "# Title\n\n<!-- evidence:equivalence -->\nold\n<!-- /evidence -->\n\nrest\n"


def row(**changes: Any) -> dict[str, Any]:
    fixed = {"name": "TP2", "value": 1.234567e-6, "unit": "", "required": "<= 1e-5", "reference": None}
    origin = {"reference_value": None, "command": "make test", "date": "2026-01-02", "machine": "2 cores"}
    return {**fixed, **origin, **changes}


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "evidence").mkdir(parents=True)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs" / "evidence" / "equivalence.json").write_text(json.dumps([row(), row(name="a|b", value=3)]))
    return tmp_path


def test_places_are_filled_and_the_rest_stays(repo: Path) -> None:
    assert main(["--repo", str(repo), "--check"]) == 1
    assert (repo / "README.md").read_text() == README
    assert main(["--repo", str(repo)]) == 0
    expected = (
        "| What | Measured | Required |\n| --- | --- | --- |\n| TP2 | 1.23e-06 | <= 1e-5 |\n| a\\|b | 3 | <= 1e-5 |\n"
        "\nMeasured by `make test` on 2026-01-02 (2 cores).\n"
    )
    assert (repo / "README.md").read_text() == README.replace("old\n", expected)
    assert main(["--repo", str(repo), "--check"]) == 0


def test_zero_is_shown() -> None:
    assert "| x | 0 |" in table([row(name="x", value=0.0, required=None)])


def test_measures_of_a_subject_share_a_line() -> None:
    names = [
        f"{layout}: {measure}" for layout in ("TP2", "CP2, ring: p2p", "PP2", "DP2") for measure in ("loss", "norm")
    ]
    text = compact([row(name=name, value=number) for number, name in enumerate(names)])
    assert "| What | loss (<= 1e-5) | norm (<= 1e-5) |" in text
    assert "| CP2, ring: p2p | 2 | 3 |" in text and "| DP2 | 6 | 7 |" in text
    one_missing = compact([row(name=name, value=1) for name in names[:-1]])
    assert "| DP2 | 1 |  |" in one_missing


def test_of_many_rows_the_worst_of_each_kind_is_shown(repo: Path) -> None:
    rows = [row(name=f"layout {number}: loss", value=number * 1e-7) for number in range(60)]
    rows += [row(name=f"speed {number}", value=2.0 + number, unit="x", required=">= 1") for number in range(3)]
    rows += [row(name=f"lost {number}", value=0, unit=f"of {number} tensors", required="0") for number in (8, 9)]
    rows += [row(name="no bound", value=99, required=None)]
    (repo / "docs" / "evidence" / "equivalence.json").write_text(json.dumps(rows))
    text = fill(README, repo / "docs" / "evidence")
    assert "| layout 59: loss | 5.9e-06 |  | <= 1e-5 | 60 |" in text
    assert "| speed 0 | 2 | x | >= 1 | 3 |" in text
    assert "| lost 8 | 0 | of 8 tensors | 0 | 2 |" in text
    assert "All 66 figures: [docs/evidence/equivalence.md](docs/evidence/equivalence.md)." in text
    assert "no bound" not in text and "layout 58" not in text


def test_other_names_keep_their_own_lines() -> None:
    rows = [row(name="wall time"), row(name="accuracy")]
    assert compact(rows) == table(rows)


def test_a_topic_without_a_file_says_so(tmp_path: Path) -> None:
    assert f"\n{NOT_MEASURED}\n<!-- /evidence -->" in fill(README, tmp_path)


@pytest.mark.parametrize(
    "text", ["<!-- evidence:equivalence -->\n", "<!-- /evidence -->\n", "x <!-- evidence:a -->\n<!-- /evidence -->\n"]
)
def test_a_marker_without_partner_is_an_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match="markers"):
        fill(text, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ("{}", "expected a list"), ('[{"name": "x"}]', "row 1: missing keys"), ("[3]", "row 1")],
)
def test_bad_evidence_is_an_error(content: str, message: str, repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = repo / "docs" / "evidence" / "equivalence.json"
    path.write_text(content)
    with pytest.raises(EvidenceError, match=message):
        read_rows(path)
    assert main(["--repo", str(repo)]) == 2
    assert message in capsys.readouterr().err
    assert (repo / "README.md").read_text() == README

import threading

import pytest

from tests import evidence
from tests.evidence import machine, record, row
from tools.update_readme import ROW_KEYS, read_rows


@pytest.fixture(autouse=True)
def writing(monkeypatch):
    monkeypatch.delenv("MEGAVLM_NO_EVIDENCE", raising=False)


def test_rows_merge_by_name_and_are_sorted(tmp_path):
    record("parity", [row("b", 1.23456e-7, unit="u", required="<= 1e-5"), row("c", 2)], tmp_path)
    record("parity", [row("b", 5.0, reference="other", reference_value=0.123456), row("a", "yes")], tmp_path)
    rows = read_rows(tmp_path / "parity.json")
    assert [one["name"] for one in rows] == ["a", "b", "c"]
    assert [one["value"] for one in rows] == ["yes", 5.0, 2]
    assert rows[1]["reference_value"] == 0.123 and rows[1]["required"] is None
    assert all(tuple(one) == ROW_KEYS for one in rows)


def test_the_page_has_a_title_and_every_row(tmp_path):
    record("equivalence", [row("TP2", 1.23456e-7, required="<= 1e-5")], tmp_path)
    page = (tmp_path / "equivalence.md").read_text()
    assert page.startswith("# Equivalence\n\n")
    assert "| TP2 | 1.23e-07 |" in page and machine() in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["equivalence.json", "equivalence.md"]


def test_writing_again_changes_nothing(tmp_path):
    rows = [row("b", 1.0), row("a", 2.0)]
    record("parity", rows, tmp_path)
    before = (tmp_path / "parity.json").read_bytes()
    record("parity", reversed(rows), tmp_path)
    assert (tmp_path / "parity.json").read_bytes() == before


def test_nothing_is_written_when_switched_off(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAVLM_NO_EVIDENCE", "1")
    record("parity", [row("a", 1.0)], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_concurrent_writers_lose_no_row(tmp_path):
    threads = [threading.Thread(target=record, args=("parity", [row(str(i), i)], tmp_path)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_rows(tmp_path / "parity.json")) == 12


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_figures_that_are_none_are_refused_and_the_file_stays(value, tmp_path):
    record("parity", [row("a", 1.0)], tmp_path)
    with pytest.raises(ValueError, match="Out of range"):
        record("parity", [row("b", value)], tmp_path)
    assert [one["name"] for one in read_rows(tmp_path / "parity.json")] == ["a"]


def test_a_row_with_other_keys_or_an_unknown_topic_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="keys"):
        record("parity", [{**row("a", 1.0), "extra": 1}], tmp_path)
    with pytest.raises(KeyError):
        record("other", [row("a", 1.0)], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    record("parity", [row("a", 1.0)], tmp_path)
    before = (tmp_path / "parity.json").read_text()

    def fail(*_paths):
        raise OSError("no space")

    monkeypatch.setattr(evidence.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        record("parity", [row("b", 1.0)], tmp_path)
    assert (tmp_path / "parity.json").read_text() == before
    assert not list(tmp_path.glob(".parity*"))


def test_machine_names_versions():
    for part in ("cores", "Python ", "torch ", "megatron-core ", "transformers "):
        assert part in machine()

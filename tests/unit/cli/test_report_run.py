import pytest

from megavlm.cli import main as frame
from megavlm.observe.metrics import RunLog


@pytest.fixture(autouse=True)
def command(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def write_log(run_dir):
    with RunLog(run_dir, tensorboard=False) as log:
        log.log_event(0, "start")


def test_it_writes_the_page_and_says_where(tmp_path, capsys):
    write_log(tmp_path)
    assert frame.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_several_runs_get_one_page(tmp_path, capsys):
    runs, page = [str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "page.html"
    for run in runs:
        write_log(run)
    assert frame.main(["report", *runs, "--title", "Two runs", "--out", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert "<h1>Two runs</h1>" in page.read_text()
    assert frame.main(["report", *runs]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_broken_timeline_is_one_line(tmp_path, capsys):
    write_log(tmp_path)
    (tmp_path / "timeline.json").write_text('{"version": 1}')
    assert frame.main(["report", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "timeline.json encoder_costs_RM: got nothing" in captured.err


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    assert frame.main(["report", str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_mentions_the_timeline_and_ends_with_an_example(capsys):
    assert frame.main(["report", "--help"]) == 0
    found = capsys.readouterr().out
    assert "timeline" in found
    assert "\nexamples:\n" in found and found.endswith("  megavlm report runs/demo\n")

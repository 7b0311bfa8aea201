"""The data commands as words: what they print and write, exit codes, and what they refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megavlm.cli.data import COMMANDS
from megavlm.cli.main import main
from tests.distributed.running import call, the_error
from tests.pool import PoolKeeper
from tests.tiny import write_tiny_qwen3vl
from tests.unit.data.inspect.conftest import chat, photo


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Six rows: the third repeats the first, the fourth has a broken image, the last shows a copy of an image."""
    for number in range(3):
        photo(number).save(tmp_path / f"{number}.png")
    shutil.copy(tmp_path / "2.png", tmp_path / "copy.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:900])
    lines: list[Any] = [
        chat("What?", "two", "0.png"),
        chat("Who?", "me", "1.png"),
        chat("What?", "two", "0.png"),
        chat("What?", "two", "broken.png"),
        chat("Where?", "here", "2.png"),
        chat("Where?", "here", "copy.png"),
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "rows.jsonl"


def test_check(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "check", str(rows), "--nproc", "1", "--json", str(tmp_path / "found.json")]
    assert main([*words, "--write-clean", str(tmp_path / "clean.jsonl")]) == 1
    out = capsys.readouterr().out
    assert "broken_image" in out and "repeated_row" in out and "2 do not pass" in out and "rows.jsonl:4" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["counts"] == {"broken_image": 1, "repeated_row": 1, "duplicate_image": 1}
    assert (found["rows"], found["passing"]) == (6, 4)
    assert main(["data", "check", str(tmp_path / "clean.jsonl"), "--nproc", "1"]) == 0
    assert "4 rows, 4 images: all pass" in capsys.readouterr().out


def test_dedup(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report = tmp_path / "unique.jsonl", tmp_path / "dropped.json"
    assert main(["data", "dedup", str(rows), "--out", str(out), "--json", str(report), "--nproc", "1"]) == 0
    assert "6 rows: 2 dropped, 0 not readable, 4 written" in capsys.readouterr().out
    assert [one["row"] for one in json.loads(report.read_text())["dropped"]] == [2, 5]
    images = [json.loads(line)["images"] for line in out.read_text().splitlines()]
    assert images == [["0.png"], ["1.png"], ["broken.png"], ["2.png"]]


def test_mix(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other" / "rows.jsonl"
    other.parent.mkdir()
    other.write_text(json.dumps(chat("Alone?", "yes")) + "\n")
    words = ["data", "mix", str(rows), str(other), "--weights", "3,1", "--num-rows", "8", "--seed", "5"]
    contents = []
    for name in ("a.jsonl", "b.jsonl"):
        assert main([*words, "--out", str(tmp_path / name), "--json", str(tmp_path / "mix.json")]) == 0
        contents.append((tmp_path / name).read_text())
    assert contents[0] == contents[1] and contents[0].count("Alone?") == 2 and contents[0].count("\n") == 8
    assert [one["count"] for one in json.loads((tmp_path / "mix.json").read_text())["sources"]] == [6, 2]
    assert "seed 5" in capsys.readouterr().out


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3vl(tmp_path_factory.mktemp("models") / "qwen")


def test_stats_and_preview_of_a_recipe(rows: Path, hf_dir: Path, tmp_path: Path, workers: PoolKeeper) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": {"hf_dir": str(hf_dir)}, "data": {"train": [str(rows)]}}))
    page, stats = tmp_path / "stats.html", tmp_path / "stats.json"
    words = ["data", "stats", str(recipe), "data.max_length=30", "--nproc", "1", "--html", str(page)]
    ((code, out, err),) = workers(1).run(call, words=[*words, "--json", str(stats)])
    assert code == 0, err
    assert "Tokens of a row" in out and "Padding" in out
    found = json.loads(stats.read_text())
    assert found["totals"]["images"] == 6 and found["totals"]["visual tokens"] > 0
    assert found["num_too_long"] == 0 and [one["num_packs"] for one in found["padding"]] == [6, 6]
    text = page.read_text()
    assert "histogram-tokens" in text and "Visual tokens of a row" in text and "://" not in text
    preview = tmp_path / "preview.html"
    words = ["data", "preview", str(recipe), "--num-rows", "4", "--out", str(preview)]
    ((code, out, err),) = workers(1).run(call, words=words)
    assert code == 0 and "4 rows written" in out and "1 with a problem" in out, err
    assert preview.read_text().count("data:image/png") == 3


def test_score(rows: Path, tmp_path: Path, workers: PoolKeeper) -> None:
    from tests.unit.evaluate.test_image_text_scores import write_model

    model = write_model(tmp_path / "clip", "clip")
    words = ["data", "score", str(rows), "--model", str(model), "--hard-negatives", "1"]
    words += ["--scores", str(tmp_path / "scores.jsonl"), "--json", str(tmp_path / "summary.json")]
    ((code, out, err),) = workers(1).run(call, words=words)
    assert code == 0, err
    assert "1 rows have a problem" in out and "6 rows, 5 scored" in out
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    values = [line["image_text_score"] for line in lines]
    assert values[3] is None and "broken.png" in lines[3]["problem"] and values[0] == values[2]
    assert all(len(line["hard_negative_images"]) == 1 for number, line in enumerate(lines) if number != 3)
    least = sorted(value for value in values if value is not None)[2]
    out_file = tmp_path / "fitting.jsonl"
    words = ["data", "score", str(rows), "--model", str(model), "--min-score", str(least), "--out", str(out_file)]
    ((code, _, err),) = workers(1).run(call, words=words)
    assert code == 0, err
    written = [json.loads(line)["image_text_score"] for line in out_file.read_text().splitlines()]
    assert written == [value for value in values if value is not None and value >= least]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["check", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["check"], ["required", "`megavlm data check --help`"]),
        (["nothing"], ["invalid choice"]),
        (["preview", "ROWS"], ["--hf-dir: got nothing"]),
        (["check", "ROWS", "--max-distance", "99"], ["--max-distance: got 99"]),
        (["dedup", "ROWS", "--out", "x.json"], ["x.json", ".jsonl"]),
        (["mix", "ROWS", "--weights", "a", "--out", "x.jsonl"], ["--weights: got 'a'"]),
        (["score", "ROWS", "--model", "m", "--min-score", "0.1"], ["--min-score", "--out"]),
        (["stats", "RECIPE", "--hf-dir", "x"], ["--hf-dir", "model.hf_dir="]),
        (["stats", "RECIPE", "--eval"], ["data.eval: got nothing"]),
    ],
)
def test_refusals_are_one_line(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], parts: list[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"train": [str(rows)]}}))
    names = {"ROWS": str(rows), "RECIPE": str(recipe)}
    assert main(["data", *(names.get(word, word) for word in words)]) == 2
    the_error(capsys.readouterr().err, *parts)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["data", name, "--help"], ["data", "--help", name]):
        assert main(words) == 0
        assert f"  megavlm data {name} " in capsys.readouterr().out


def test_index(rows: Path, tmp_path: Path, workers: PoolKeeper) -> None:
    """Training finds it, and looks at no row again; a row with a broken image stops it, or is left out."""
    hf_dir = write_tiny_qwen3vl(tmp_path / "model")
    words = ["data", "index", str(rows), "--hf-dir", str(hf_dir), "--nproc", "2", "--max-length", "512"]
    [(code, out, err)] = workers(1).run(call, words=[*words, "--json", str(tmp_path / "index.json")])
    assert code == 0, err
    assert "broken_image" in out and "rows.jsonl:4" in out
    facts = json.loads((tmp_path / "index.json").read_text())
    assert (facts["rows"], facts["kept"], facts["broken_image"]) == (6, 5, 1)
    folder = Path(facts["folder"])
    assert folder.parent == rows.parent / ".megavlm_index"
    recipe = {
        "name": "run",
        "output_dir": str(tmp_path / "runs"),
        "model": {"hf_dir": str(hf_dir)},
        "data": {"train": [str(rows)], "max_length": 512},
        "train": {"train_iters": 1, "global_batch_size": 2, "precision": "fp32"},
        "checkpoint": {"save_at_end": False},
        "observe": {"report": False, "progress": False, "tensorboard": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    [(code, _, err)] = workers(1).run(call, words=["train", str(tmp_path / "recipe.yaml")])
    assert code == 2
    the_error(err, "rows.jsonl:4", "broken.png")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    [(code, _, err)] = workers(1).run(call, words=["train", str(tmp_path / "recipe.yaml"), "data.on_error=skip"])
    assert code == 0, err
    assert "dropped 1 of 6 rows: broken_image" in err
    assert not (tmp_path / "runs" / "run" / "index").exists()
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name.startswith("part_")}.items() <= (
        before.items()
    )

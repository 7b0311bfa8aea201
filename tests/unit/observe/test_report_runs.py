"""One page about several runs: a chapter each, with its results before and after."""

import json
import re

import pytest
from PIL import Image

from megavlm.errors import UseError
from megavlm.observe.metrics import LOG_NAME
from megavlm.observe.report_runs import NUM_SAMPLES, write_runs_report
from tests.unit.observe.test_report import EVIL, Page, add_rows, sample, write_run, write_samples


@pytest.fixture
def runs(tmp_path):
    """Two runs: embeddings, then answers."""
    first, second = tmp_path / "one", tmp_path / "two"
    write_run(first, [4.0, 1.0])
    shares = [("recall_at_1/image_to_text", 0.01), ("recall_at_1/text_to_image", 0.02)]
    add_rows(
        first,
        {"kind": "eval", "step": 0, "time": 1.0, "loss": 4.5, **dict(shares)},
        {"kind": "eval", "step": 2, "time": 2.0, "loss": 1.5, **{name: 30 * share for name, share in shares}},
    )
    (first / "recipe.yaml").write_text(f"name: pairs\ndescription: {json.dumps(EVIL)}\ntrain: {{stage: contrastive}}\n")
    write_run(second, [2.0, 0.5])
    evaluation = {"kind": "event", "step": 2, "time": 3.0, "event": "evaluation", "text": "asked"}
    add_rows(second, evaluation | {"exact_match_before": 0.125, "exact_match_after": 0.75, "num_samples": 8})
    Image.new("RGB", (40, 20), "red").save(second / "a.png")
    write_samples(second, *(sample(id=f"row {number}", images=["a.png"]) for number in range(10)))
    return [first, second]


def page_of(runs, out):
    path = write_runs_report(runs, out, "A title")
    assert path == out
    return Page(path.read_text(encoding="utf-8"))


def test_every_run_is_a_chapter_with_its_results(runs, tmp_path):
    page = page_of(runs, tmp_path / "new" / "page.html")
    assert page.text.index("A title") < page.text.index("pairs") < page.text.index("two")
    for words in (
        "report of 2 runs", "1% → to 30%", "2% → to 60%", "4.500 → to 1.500", "12.5% → to 75%", "of 8 held-out answers",
        "mean over images and their texts", "mean cross-entropy per supervised token", EVIL,
    ):  # fmt: skip
        assert words in page.text, words
    assert page.count("figure") == 3, "loss and shares of the one, loss of the other"
    assert page.count("article") == NUM_SAMPLES and "row 0" in page.text and "row 7" in page.text


def test_names_on_the_page_are_its_own(runs, tmp_path):
    page = page_of([runs[0], runs[0], runs[1]], tmp_path / "page.html")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 10
    wanted = {attributes["for"] for _, attributes in page.tags if "for" in attributes}
    wanted |= {attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes}
    assert wanted <= set(ids)
    groups = {attributes["name"] for tag, attributes in page.tags if tag == "input"}
    assert len(groups) == 3, "the scale of one chart is not that of another"


def test_nothing_is_loaded_from_outside(runs, tmp_path):
    page = page_of(runs, tmp_path / "page.html")
    assert page.loaded and all(value.startswith("data:image/") for value in page.loaded)
    assert "@import" not in page.source and "url(" not in page.source
    assert not re.search(r"<script>alert", page.source)


def test_a_folder_without_a_log_is_named(runs, tmp_path):
    (runs[1] / LOG_NAME).unlink()
    with pytest.raises(UseError, match="two"):
        write_runs_report(runs, tmp_path / "page.html", "A title")
    assert not (tmp_path / "page.html").exists()

import base64
import html
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from megavlm.errors import UseError
from megavlm.observe.metrics import LOG_NAME, RunLog, StepMetrics
from megavlm.observe.report import write_report
from megavlm.observe.report_samples import MAX_IMAGE_PX, embed_image

VOID = {"meta", "link", "img", "input", "br", "hr"}
LOADING = {"src", "href", "srcset", "poster", "data", "action", "xlink:href"}
EVIL = "<script>alert('x')</script>"


class Page(HTMLParser):
    """What a browser would make of the page: its text by place, and whether every tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loaded, self.tags, self.texts, self.paths = [], [], [], [], []
        self.source = text
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.loaded += [value for name, value in attributes if name in LOADING]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.loaded += [value for name, value in attributes if name in LOADING]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def count(self, tag, css_class=None):
        return sum(
            name == tag and (css_class is None or css_class in (attributes.get("class") or "").split())
            for name, attributes in self.tags
        )


def step_metrics(step, loss, grad_norm=0.5, learning_rates=None):
    return StepMetrics(
        step=step,
        loss=loss,
        num_tokens=100.0,
        grad_norm=grad_norm,
        grad_norms={"vision": 0.3, "language": 0.4},
        learning_rates=learning_rates or {"vision": 1e-4, "language": 1e-3},
        tokens_per_second=2000.0,
        images_per_second=10.0,
        step_s=0.5,
        consumed_samples=8 * step,
    )


def write_run(run_dir, losses, log_steps=1, total_steps=None):
    with RunLog(run_dir, tensorboard=False) as log:
        log.log_event(
            0,
            "start",
            "from here",
            total_steps=total_steps or len(losses) * log_steps,
            layout="TP2 × PP2",
            world_size=4,
            environment={"torch": "9.8.7"},
        )
        for number, loss in enumerate(losses, start=1):
            log.log_train(step_metrics(number * log_steps, loss))


def add_rows(run_dir, *rows):
    with (run_dir / LOG_NAME).open("a") as log:
        log.writelines(json.dumps(row) + "\n" for row in rows)


def write_samples(run_dir, *samples):
    (run_dir / "samples.json").write_text(json.dumps(samples))


def sample(**changes):
    plain = {"id": "a.jsonl:1", "images": [], "question": "What?", "truth": "42", "before": "7", "after": " 42\n"}
    return plain | changes


def report(run_dir):
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_a_full_report_says_what_happened(tmp_path):
    write_run(tmp_path, [5.0 - 0.04 * step for step in range(100)])
    add_rows(
        tmp_path,
        {"kind": "eval", "step": 0, "time": 1.0, "loss": 4.75, "exact_match": 0.0, "num_samples": 200},
        {"kind": "eval", "step": 100, "time": 2.0, "loss": 0.875, "exact_match": 0.925, "num_samples": 200},
        {"kind": "event", "step": 100, "time": 3.0, "event": "save", "text": "step_000100"},
    )
    (tmp_path / "recipe.yaml").write_text("name: my-run\nmodel:\n  hf_dir: a<b\n")
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.png")
    write_samples(tmp_path, sample(images=["a.png"], task="number"))
    page = report(tmp_path)
    for words in (
        "my-run", "0% → to 92.5%", "of 200 held-out answers", "4.750 → to 0.8750", "5.000 → to 1.040",
        "100 of 100", "2k tokens/s", "TP2 × PP2", "4 ranks", "step_000100", "9.8.7", "hf_dir: a<b",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.count("figure") == 6
    assert page.count("figcaption") == 6
    assert page.count("img") == 1
    assert page.count("span", "right") == 1 and page.count("span", "wrong") == 1
    assert not page.count("p", "alert")


def test_nothing_is_loaded_from_outside(tmp_path):
    write_run(tmp_path, [2.0, 1.0])
    Image.new("L", (30, 30)).save(tmp_path / "a.png")
    write_samples(tmp_path, sample(images=["a.png"], question="see https://example.org"))
    page = report(tmp_path)
    assert page.loaded and all(value.startswith("data:image/") for value in page.loaded)
    assert "@import" not in page.source and "url(" not in page.source
    assert not page.count("link") and not page.count("iframe")
    policies = [attributes["content"] for tag, attributes in page.tags if "content-security" in str(attributes).lower()]
    assert policies and policies[0].startswith("default-src 'none'")


def test_text_from_the_run_is_never_markup(tmp_path):
    write_run(tmp_path, [2.0])
    add_rows(tmp_path, {"kind": "event", "step": 1, "time": 1.0, "event": EVIL, "text": EVIL, "path": EVIL})
    (tmp_path / "recipe.yaml").write_text(f"name: {json.dumps(EVIL)}\n")
    write_samples(
        tmp_path,
        sample(id=EVIL, images=[f"{EVIL}.png"], question=EVIL, truth=EVIL, before=EVIL, after=EVIL, task=EVIL),
    )
    page = report(tmp_path)
    assert EVIL not in page.source
    assert html.escape("<script>alert(") in page.source
    num_charts = page.count("figure")
    assert page.count("script") == num_charts + 1
    assert EVIL in page.text


def test_component_names_cannot_end_the_script(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log_train(step_metrics(1, 1.0, learning_rates={"</script><b>": 1.0, "other": 2.0}))
    page = report(tmp_path)
    assert not page.count("b")
    assert "</script><b>" in page.text


@pytest.mark.parametrize("losses", [[1.0], [math.nan], [1.0, math.inf, 0.5], [0.0, 0.0, 0.0]])
def test_odd_runs_still_have_a_report(tmp_path, losses):
    write_run(tmp_path, losses)
    page = report(tmp_path)
    assert f"{len(losses)} of {len(losses)}" in page.text
    assert page.count("p", "alert") == (0 if all(map(math.isfinite, losses)) else 1)
    for data in re.findall(r'class="readout">(.*?)</script>', page.source):
        assert json.loads(data)["curves"]
        assert "NaN" not in data and "Infinity" not in data
    for path in re.findall(r' d="([^"]*)"', page.source):
        assert "nan" not in path and "inf" not in path


def test_what_is_not_finite_is_said_with_its_steps(tmp_path):
    losses = [1.0] * 50
    losses[19] = losses[29] = math.nan
    write_run(tmp_path, losses)
    page = report(tmp_path)
    assert "in 2 logged steps: first at step 20, last at step 30." in page.text
    assert page.count("path", "nonfinite") >= 2


def test_an_empty_log_and_an_unfinished_run_are_said(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log_event(0, "start")
    assert "No training step was logged." in report(tmp_path).text
    write_run(tmp_path, [1.0] * 3, total_steps=1000)
    assert "The log ends at step 3 of 1,000." in report(tmp_path).text


def test_a_torn_log_line_is_left_out(tmp_path):
    write_run(tmp_path, [3.0, 2.0], total_steps=2)
    with (tmp_path / LOG_NAME).open("a") as log:
        log.write('{"kind": "train", "step": 3, "lo')
    page = report(tmp_path)
    assert "2 of 2" in page.text and "3.000 → to 2.000" in page.text


def test_totals_count_the_steps_between_logged_ones(tmp_path):
    write_run(tmp_path, [1.0] * 5, log_steps=10)
    page = report(tmp_path)
    assert "50 of 50" in page.text
    assert "Tokens 50,000" in page.text and "5,000 supervised" in page.text
    assert "Images 250" in page.text


def test_wall_time_leaves_out_the_time_between_attempts(tmp_path):
    rows = [(0, "start", 100.0), (5, "save", 160.0), (5, "resume", 9000.0), (9, "end", 9030.0)]
    add_rows(tmp_path, *({"kind": "event", "step": s, "event": e, "time": t, "text": ""} for s, e, t in rows))
    page = report(tmp_path)
    assert "1 min 30 s" in page.text and "2 attempts" in page.text


def test_exact_match_comes_from_the_samples_where_the_log_has_none(tmp_path):
    write_run(tmp_path, [1.0])
    write_samples(tmp_path, sample(), sample(after="41"), sample(before=None, after=None))
    page = report(tmp_path)
    assert "0% → to 50%" in page.text
    assert "not asked" in page.text
    assert page.count("article", "is-right") == 1 and page.count("article", "is-wrong") == 1


def test_the_layout_comes_from_the_recipe_where_the_log_has_none(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log_train(step_metrics(1, 1.0))
    (tmp_path / "recipe.yaml").write_text("parallel: {tensor_model_parallel_size: 4, context_parallel_size: 2}\n")
    assert "TP4 × CP2" in report(tmp_path).text


def test_long_runs_stay_small_and_keep_their_peaks(tmp_path):
    rows = []
    for step in range(1, 20_001):
        row = {"kind": "train", "step": step, "time": float(step), "loss": 1.0 + 0.01 * math.sin(step), "step_s": 1.0}
        rows.append(row | {"grad_norm": 1.0, "tokens_per_second": 1.0, "images_per_second": 1.0, "num_tokens": 1.0})
    rows[12_344]["loss"] = 77.5
    add_rows(tmp_path, *rows)
    page = report(tmp_path)
    assert len(page.source) < 600_000
    curves = json.loads(re.search(r'class="readout">(.*?)</script>', page.source).group(1))["curves"]
    raw = next(curve for curve in curves if curve["raw"])
    assert len(raw["x"]) <= 1000
    assert raw["x"][raw["y"].index(77.5)] == 12_345


def test_missing_and_broken_images_have_a_placeholder(tmp_path):
    write_run(tmp_path, [1.0])
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("RGB", (300, 300), "red").save(tmp_path / "whole.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "whole.png").read_bytes()[:120])
    write_samples(tmp_path, sample(images=["gone.png", "empty.png", "torn.png"]))
    page = report(tmp_path)
    assert page.count("p", "no-picture") == 3 and page.count("img") == 0
    assert "gone.png missing" in page.text and "empty.png not readable" in page.text


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "I;16", "I", "F"])
def test_images_of_every_kind_fit_into_the_page(tmp_path, mode):
    path = tmp_path / "a.tiff"
    Image.new(mode, (900, 450)).save(path)
    picture = embed_image(path)
    assert picture.problem == ""
    assert (picture.width_px, picture.height_px) == (MAX_IMAGE_PX, MAX_IMAGE_PX // 2)
    decoded = Image.open(io.BytesIO(base64.b64decode(picture.uri.split(",")[1])))
    assert decoded.size == (MAX_IMAGE_PX, MAX_IMAGE_PX // 2)


def test_small_images_are_kept_to_the_pixel_and_transparency_becomes_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.putpixel((3, 3), (0, 0, 0, 0))
    image.save(tmp_path / "a.png")
    decoded = Image.open(io.BytesIO(base64.b64decode(embed_image(tmp_path / "a.png").uri.split(",")[1])))
    assert decoded.getpixel((3, 3)) == (255, 255, 255)
    assert decoded.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("content", "where"),
    [("{", "samples.json"), ('{"a": 1}', "samples.json"), ('[{"question": "a", "truth": "b"}, {"id": 1}]', "sample 2")],
)
def test_damaged_samples_are_an_error_that_names_the_place(tmp_path, content, where):
    write_run(tmp_path, [1.0])
    (tmp_path / "samples.json").write_text(content)
    with pytest.raises(UseError, match=where):
        write_report(tmp_path)


def test_a_folder_without_a_log_is_an_error(tmp_path):
    with pytest.raises(UseError, match=LOG_NAME):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_recipe_that_is_not_yaml_is_still_shown(tmp_path):
    write_run(tmp_path, [1.0])
    (tmp_path / "recipe.yaml").write_text("a: [1,\n<&>")
    page = report(tmp_path)
    assert "a: [1, <&>" in page.text
    assert tmp_path.name in page.text

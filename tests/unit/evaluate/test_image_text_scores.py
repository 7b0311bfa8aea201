"""Scores by tiny random CLIP and SigLIP models, against transformers' own forward pass of both towers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
)

from megavlm.data.inspect.rows import open_rows
from megavlm.errors import UseError
from megavlm.evaluate.image_text_scores import ImageTextModel, score_rows, text_of
from tests.tiny import VOCAB_SIZE, make_tokenizer
from tests.unit.data.inspect.conftest import chat, photo

MAX_TOKENS = 16
_TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_TOKENS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 4,
}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_PIXELS = {"image_size": 28, "patch_size": 7}
_PROCESSORS = {
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
    },
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 28, "width": 28}},
}


def write_model(folder: Path, kind: str) -> Path:
    """A directory as CLIP's and SigLIP's are; weights are spread, so that scores differ."""
    torch.manual_seed(0)
    if kind == "clip":
        model: Any = CLIPModel(CLIPConfig(text_config=_TEXT, vision_config=_VISION | _PIXELS, projection_dim=24))
    else:
        model = SiglipModel(SiglipConfig(text_config=_TEXT | {"projection_size": 32}, vision_config=_VISION | _PIXELS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    make_tokenizer(["<unk>", "<s>", "</s>", "<image>", "<pad>"], **roles).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PROCESSORS[kind]))
    return folder


@pytest.fixture(scope="module", params=["clip", "siglip"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[Any]], str]:
    for number in range(6):
        photo(number).save(tmp_path / f"{number}.png")

    def write(rows: list[Any]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


TEXTS = ["a red square", "the lazy dog", "a blue circle", "digits", "largest number", "quick"]


@torch.no_grad()
def reference(model_dir: Path, images: list[Path], texts: list[str]) -> torch.Tensor:
    """Cosines [images, texts] out of transformers' model as a whole, whose logits are scaled cosines."""
    is_clip = "clip" in model_dir.name and "sig" not in model_dir.name
    model: Any = (CLIPModel if is_clip else SiglipModel).from_pretrained(model_dir).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(model_dir), AutoImageProcessor.from_pretrained(model_dir)
    pixels = processor([Image.open(image).convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    padding = {"padding": "longest"} if is_clip else {"padding": "max_length"}
    inputs = tokenizer(texts, truncation=True, max_length=MAX_TOKENS, return_tensors="pt", **padding)
    mask = {"attention_mask": inputs["attention_mask"]} if is_clip else {}
    output = model(input_ids=inputs["input_ids"], pixel_values=pixels, **mask)
    bias = 0 if is_clip else model.logit_bias
    return (output.logits_per_image - bias) / model.logit_scale.exp()


def test_scores_are_those_of_the_whole_model(model_dir: Path, write, tmp_path: Path) -> None:
    rows = [chat("What is it?", text, f"{number}.png") for number, text in enumerate(TEXTS)]
    rows += [chat("Both?", "a red square", "0.png", "1.png"), chat("No image?", "none")]
    scores = score_rows(open_rows([write(rows)]), ImageTextModel(model_dir), batch_size=4)
    cosines = reference(model_dir, [tmp_path / f"{number}.png" for number in range(6)], TEXTS)
    expected = [*cosines.diag().tolist(), float(cosines[:2, 0].mean())]
    assert cosines.max() - cosines.min() > 0.05, "scores that tell rows apart"
    assert [one.score for one in scores[:7]] == pytest.approx(expected, abs=2e-6)
    assert scores[7].score is None and not scores[7].problem


def test_what_cannot_be_scored_is_said(model_dir: Path, write, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"nothing")
    rows = [chat("What?", "digits", "bad.png"), {"messages": 1}, chat("What?", "the quick fox " * 20, "1.png")]
    model = ImageTextModel(model_dir)
    broken, unread, long = score_rows(open_rows([write(rows)]), model, num_negatives=1)
    assert broken.score is None and "bad.png" in broken.problem
    assert unread.score is None and "row 2" in unread.problem
    assert long.score is not None and long.is_cut and not broken.is_cut
    assert long.near_images == () and long.near_texts == (0,), "a broken image is nobody's negative"


def test_hard_negatives(model_dir: Path, write, tmp_path: Path) -> None:
    rows = [chat("What is it?", text, f"{number}.png") for number, text in enumerate(TEXTS)]
    rows.append(chat("Again?", TEXTS[1], "0.png"))  # so the image of row 0 and the text of row 1 belong together
    scores = score_rows(open_rows([write(rows)]), ImageTextModel(model_dir), num_negatives=2)
    cosines = reference(model_dir, [tmp_path / f"{number}.png" for number in range(6)], TEXTS)
    for own in (*((number, number) for number in range(6)), (0, 1)):
        cosines[own] = -torch.inf
    for number in range(6):
        images = cosines[:, number].topk(2).indices.tolist()
        assert scores[number].near_images == tuple(str(tmp_path / f"{image}.png") for image in images)
        assert scores[number].near_texts == tuple(cosines[number].topk(2).indices.tolist())


def test_the_text_of_a_row(write) -> None:
    turns = [
        ("system", "be brief"),
        ("user", "<image>\nWhat?"),
        ("assistant", "a dog"),
        ("user", "and?"),
        ("assistant", "x"),
    ]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns], "images": ["0.png"]}]
    (sample,) = open_rows([write(rows)])
    assert text_of(sample, "answers") == "a dog x"
    assert text_of(sample, "questions") == "What? and?"
    assert text_of(sample, "all") == "be brief What? a dog and? x"


def test_directories_that_hold_no_such_model(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UseError, match="--model"):
        ImageTextModel(tmp_path / "nowhere")
    shutil.copytree(model_dir, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    with pytest.raises(UseError, match="got qwen2; expected clip or siglip"):
        ImageTextModel(tmp_path / "other")

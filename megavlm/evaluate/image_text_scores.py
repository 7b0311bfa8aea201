"""How well a row's images and text fit, by a CLIP or SigLIP model: cosines of their embeddings; and hard negatives.

Source: CLIPScore, arXiv 2104.08718, without its factor and clipping.

Shape suffixes: B batch, D values of an embedding, N images, T texts, M pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from megavlm.data.images import load_rgb
from megavlm.data.inspect.neighbours import nearest
from megavlm.data.inspect.rows import read_row
from megavlm.data.media import media_name
from megavlm.data.readers import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from megavlm.data.sample import Media, Sample
from megavlm.errors import UseError, use_error

TextOf = Literal["answers", "questions", "all"]
_ROLES: dict[str, tuple[str, ...]] = {
    "answers": ("assistant",),
    "questions": ("user",),
    "all": ("system", "user", "assistant"),
}
# How each kind of model was trained to see texts that are shorter than its longest.
_PADDING = {"clip": "longest", "siglip": "max_length"}


class ImageTextModel:
    """A model with one space for images and texts, from a Hugging Face directory; fp32, local files only.

    Attributes:
        max_tokens: longer texts are cut there.
    """

    def __init__(self, model_dir: str | Path) -> None:
        """Load model, tokenizer and image processor.

        Raises:
            UseError: the directory holds no such model.
        """
        try:
            config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
            if config.model_type not in _PADDING:
                raise use_error(
                    f"--model {model_dir}", config.model_type, " or ".join(_PADDING), "name another directory"
                )
            self._padding = _PADDING[config.model_type]
            self.max_tokens: int = config.text_config.max_position_embeddings
            self._model: Any = AutoModel.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True).eval()
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
            self._processor: Any = AutoImageProcessor.from_pretrained(model_dir, local_files_only=True)
        except UseError:
            raise
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise use_error(
                f"--model {model_dir}", reason, "a Hugging Face directory of a CLIP or SigLIP model", "correct the path"
            ) from error

    @torch.no_grad()
    def embed_images(self, images: Sequence[Media], batch_size: int) -> tuple[torch.Tensor, list[str]]:
        """Unit vectors, float32 [N, D], and for each image what is wrong with it (empty: nothing; else a 0 vector)."""
        problems, batches = [], []
        for start in range(0, len(images), batch_size):
            loaded = [_loaded(image) for image in images[start : start + batch_size]]
            problems += [one if isinstance(one, str) else "" for one in loaded]
            whole = [index for index, one in enumerate(loaded) if not isinstance(one, str)]
            vectors_BD = torch.zeros(len(loaded), self._width)
            if whole:
                pixels = self._processor([loaded[index] for index in whole], return_tensors="pt")["pixel_values"]
                features_BD = self._model.get_image_features(pixel_values=pixels).pooler_output
                vectors_BD[whole] = torch.nn.functional.normalize(features_BD, dim=-1)
            batches.append(vectors_BD)
        return torch.cat(batches) if batches else torch.zeros(0, self._width), problems

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int) -> tuple[torch.Tensor, list[bool]]:
        """Unit vectors, float32 [T, D], and whether each text was cut."""
        batches, cut = [], []
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            cut += [len(ids) > self.max_tokens for ids in self._tokenizer(batch)["input_ids"]]
            inputs = self._tokenizer(
                batch, padding=self._padding, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            )
            names = ("input_ids", "attention_mask") if self._padding == "longest" else ("input_ids",)
            features_BD = self._model.get_text_features(**{name: inputs[name] for name in names}).pooler_output
            batches.append(torch.nn.functional.normalize(features_BD, dim=-1))
        return torch.cat(batches) if batches else torch.zeros(0, self._width), cut

    @property
    def _width(self) -> int:
        """Values of an embedding."""
        config = self._model.config
        return int(config.projection_dim if config.model_type == "clip" else config.vision_config.hidden_size)


def _loaded(image: Media) -> Any:
    try:
        return load_rgb(image)
    except UseError as error:
        return str(error)


@dataclass(frozen=True)
class RowScore:
    """How a row's images fit its text.

    Attributes:
        row: its number, from 0.
        sample_id: its name; empty where it cannot be read.
        score: mean cosine of its images with its text; None without an image or a text, or with a problem.
        is_cut: whether the text was longer than the model reads.
        problem: what kept it from being scored.
        near_images: names of images of other rows that are nearest to its text, nearest first.
        near_texts: rows whose texts are nearest to its first image, nearest first.
    """

    row: int
    sample_id: str
    score: float | None = None
    is_cut: bool = False
    problem: str = ""
    near_images: tuple[str, ...] = ()
    near_texts: tuple[int, ...] = ()


def text_of(sample: Sample, which: TextOf) -> str:
    """The text of a row that is compared with its images."""
    texts = [turn.text for turn in sample.turns if turn.role in _ROLES[which]]
    return " ".join(" ".join(texts).replace(IMAGE_PLACEHOLDER, " ").replace(VIDEO_PLACEHOLDER, " ").split())


def score_rows(
    samples: Sequence[Sample],
    model: ImageTextModel,
    *,
    which: TextOf = "answers",
    batch_size: int = 32,
    num_negatives: int = 0,
) -> list[RowScore]:
    """Score every row; each image and each text is embedded once.

    Args:
        samples: all rows.
        model: for the embeddings, which stay in memory (4 bytes a value).
        which: of the row's texts.
        batch_size: images or texts at a time.
        num_negatives: nearest images and texts of other rows to find for each row.
    """
    rows = [read_row(samples, row) for row in range(len(samples))]
    texts_R = [text_of(read, which) if isinstance(read, Sample) else "" for read in rows]
    images_R = [read.images if isinstance(read, Sample) else () for read in rows]
    images = list(dict.fromkeys(image for each in images_R for image in each))
    texts = list(dict.fromkeys(text for text in texts_R if text))
    images_ND, problems = model.embed_images(images, batch_size)
    texts_TD, cut = model.embed_texts(texts, batch_size)
    problem_of = dict(zip(images, problems, strict=True))
    whole = [number for number, problem in enumerate(problems) if not problem]
    images, images_ND = [images[number] for number in whole], images_ND[whole]
    image_of = {image: number for number, image in enumerate(images)}
    place_of = {text: number for number, text in enumerate(texts)}
    scores = []
    for row, read in enumerate(rows):
        if isinstance(read, UseError):
            scores.append(RowScore(row, "", problem=str(read)))
            continue
        problem = next((problem_of[image] for image in read.images if problem_of[image]), "")
        score, is_cut = None, False
        if read.images and texts_R[row] and not problem:
            shown, place = [image_of[image] for image in read.images], place_of[texts_R[row]]
            score, is_cut = float((images_ND[shown] @ texts_TD[place]).mean()), cut[place]
        scores.append(RowScore(row, read.sample_id, score, is_cut, problem))
    if not num_negatives:
        return scores
    scored = [score.row for score in scores if score.score is not None]
    fits = [(row, image_of[image], place_of[texts_R[row]]) for row in scored for image in images_R[row]]
    first_row = {text: row for row, text in reversed(list(enumerate(texts_R)))}
    return _with_negatives(
        scores, fits, images, [first_row[text] for text in texts], images_ND, texts_TD, num_negatives
    )


def _with_negatives(
    scores: list[RowScore],
    fits: list[tuple[int, int, int]],
    images: Sequence[Media],
    rows_T: Sequence[int],
    images_ND: torch.Tensor,
    texts_TD: torch.Tensor,
    num_negatives: int,
) -> list[RowScore]:
    """Add the nearest images and texts that no row shows together with a row's own.

    Args:
        scores: of all rows.
        fits: (row, image, text) that belong together.
        images: all of them.
        rows_T: the first row of each text.
        images_ND: their embeddings.
        texts_TD: embeddings of the texts.
        num_negatives: of each kind.
    """
    own_M2 = torch.tensor([(text, image) for _, image, text in fits], dtype=torch.int64).reshape(-1, 2)
    _, images_TK = nearest(texts_TD, images_ND, own_M2, num_negatives)
    _, texts_NK = nearest(images_ND, texts_TD, own_M2.flip(1), num_negatives)
    first: dict[int, tuple[int, int]] = {}
    for row, image, text in fits:
        first.setdefault(row, (image, text))
    found = []
    for score in scores:
        if score.row in first:
            image, text = first[score.row]
            near_images = [media_name(images[number]) for number in images_TK[text].tolist() if number >= 0]
            near_texts = [rows_T[number] for number in texts_NK[image].tolist() if number >= 0]
            score = replace(score, near_images=tuple(near_images), near_texts=tuple(near_texts))
        found.append(score)
    return found

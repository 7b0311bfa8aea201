"""The rows of a recipe as data sets, with the index that says what is in them."""

import dataclasses
import logging
from pathlib import Path

import numpy as np

from megavlm.checkpoint.hf_io import HFDirectory
from megavlm.config.inputs import InputSpec
from megavlm.config.schema import DataConfig, Recipe
from megavlm.config.tasks import task_names
from megavlm.data.augment import Augmentation
from megavlm.data.dataset import Dataset
from megavlm.data.encode import SampleEncoder, open_encoder
from megavlm.data.image_loading import ImageLoading, choose_backend
from megavlm.data.image_text import ImageTextPrompts
from megavlm.data.index_files import Builders, build_index, fingerprint, index_beside, is_complete
from megavlm.data.row_options import RowOptions, row_options
from megavlm.data.rows import Rows
from megavlm.data.sources import expand_paths
from megavlm.data.steps import StepRule
from megavlm.data.token_weights import token_schedule
from megavlm.data.video_spec import VideoLimits
from megavlm.train.stages.registry import STAGES

logger = logging.getLogger(__name__)


def build_encoder(recipe: Recipe, directory: HFDirectory) -> SampleEncoder:
    """What turns rows into tokens for this model."""
    return encoder_of(recipe, directory.architecture.inputs)


def encoder_of(recipe: Recipe, inputs: InputSpec) -> SampleEncoder:
    """What turns a recipe's rows into tokens."""
    data = recipe.data
    videos = VideoLimits(
        data.fps, data.fps_min_frames, data.fps_max_frames, data.video_min_pixels, data.video_max_pixels
    )
    return open_encoder(
        recipe.model.hf_dir,
        inputs,
        data.max_length,
        data.min_pixels,
        data.max_pixels,
        videos,
        box_format=data.box_format,
        max_image_pixels=data.max_image_pixels,
        template=data.template,
        too_long=data.too_long,
        schedule=token_schedule(data),
        loading=image_loading(recipe),
        row_kind=STAGES[recipe.train.stage].row_kind,
        step_rule=StepRule(recipe.reward.step_separator, recipe.reward.train_on_last_step_only),
        prompts=ImageTextPrompts(recipe.contrastive.image_prompt, recipe.contrastive.text_prompt),
        with_masks=recipe.sft.mask_loss_coeff > 0,
    )


def image_loading(recipe: Recipe) -> ImageLoading:
    """How a recipe's images are decoded on this machine.

    Raises:
        UseError: DALI, or a GPU for it, is asked for and not there.
    """
    data = recipe.data
    augmentation = Augmentation(
        data.augment_crop_min_area, data.augment_color_jitter, data.augment_flip_probability, recipe.train.seed
    )
    return ImageLoading(
        backend=choose_backend(data.image_backend, data.dali_device),
        device=data.dali_device,
        jpeg_draft=data.jpeg_draft,
        augmentation=augmentation if augmentation.changes_something else None,
    )


def options_of_rows(recipe: Recipe) -> RowOptions:
    """How a recipe's rows are read."""
    is_marked = STAGES[recipe.train.stage].row_kind == "marked"
    return dataclasses.replace(row_options(recipe.data), other_answers=is_marked)


def build_dataset(
    paths: tuple[str, ...], recipe: Recipe, encoder: SampleEncoder, builders: Builders | None = None
) -> Dataset:
    """Open rows, with the index that was made of them or is made now; says on rank 0 what was dropped or cut.

    Args:
        paths: files of rows.
        recipe: the run.
        encoder: of the rows.
        builders: the ranks, which make the index together in a folder that all of them see; None: an index that is not
            there is made in memory.

    Raises:
        UseError: naming the row at fault.
    """
    dataset = _dataset(Rows.open(paths, options_of_rows(recipe)), recipe, encoder, builders)
    dataset.task_names = task_names(recipe)
    return dataset


def build_train_set(
    recipe: Recipe, encoder: SampleEncoder, builders: Builders | None = None
) -> tuple[Dataset, tuple[int, ...]]:
    """All training rows as `build_dataset` gives them, and how many are left of each source of `data.mixture`.

    Raises:
        UseError: naming the row at fault.
    """
    files_each = [expand_paths(source.paths) for source in recipe.data.mixture] or [expand_paths(recipe.data.train)]
    rows = Rows.open([file for files in files_each for file in files], options_of_rows(recipe))
    dataset = _dataset(rows, recipe, encoder, builders)
    first_files = np.cumsum([0, *(len(files) for files in files_each)])
    first_rows = np.concatenate(([0], np.cumsum(rows.num_rows_each_file)))[first_files]
    sizes = np.diff(np.searchsorted(dataset.index.kept_N, first_rows))
    dataset.task_names = task_names(recipe)
    if dataset.task_names:
        dataset.tasks = np.repeat(_tasks_of_sources(recipe, dataset.task_names), sizes)
    return dataset, tuple(sizes.tolist())


def _tasks_of_sources(recipe: Recipe, names: tuple[str, ...]) -> list[int]:
    """The number of each source's task."""
    has_tasks = bool(recipe.data.mixture_tasks)
    return [names.index(source.task if has_tasks else source.name) for source in recipe.data.mixture]


def _dataset(rows: Rows, recipe: Recipe, encoder: SampleEncoder, builders: Builders | None) -> Dataset:
    dataset = Dataset(rows, encoder)
    folder = index_folder(rows, recipe, encoder)
    if builders is not None:  # they may have looked at the disk before and after an index was completed
        folder = Path(builders.agree(str(folder)))
    if builders is None and not is_complete(folder):
        report = dataset.prepare(**_look(recipe.data))
    else:
        report = dataset.adopt(build_index(folder, rows, encoder, **_look(recipe.data), builders=builders))
    for reason, lines in report.dropped.items():
        logger.info("dropped %d of %d rows: %s (first: %s)", len(lines), report.num_rows, reason, lines[0])
    for part, cut in report.cut.items():
        first = rows.sample_id(int(cut[0]))
        logger.info("cut %d of %d rows that are too long: %s (first: %s)", len(cut), report.num_rows, part, first)
    return dataset


def index_folder(rows: Rows, recipe: Recipe, encoder: SampleEncoder) -> Path:
    """Where the index of these rows is, or is to be made."""
    look = _look(recipe.data)
    names = [index_name(rows, encoder, True)]  # an index that knows more will do
    if not look["check_images"]:
        names.insert(0, index_name(rows, encoder, False))
    kept = Path(recipe.data.index_dir) if recipe.data.index_dir else None
    places = [kept / name if kept else index_beside(Path(rows.paths[0]), name) for name in names]
    found = next((place for place in places if is_complete(place)), None)
    if found is not None:
        return found
    return kept / names[0] if kept else Path(recipe.run_dir) / "index" / names[0]


def index_name(rows: Rows, encoder: SampleEncoder, check_images: bool) -> str:
    """The fingerprint of these rows."""
    folder = Path(rows.options.image_dir).absolute() if rows.options.image_dir else ""
    return fingerprint([Path(path) for path in rows.paths], encoder, f"{rows.options} {folder} {check_images}")


def _look(data: DataConfig) -> dict[str, bool]:
    """How closely rows are looked at."""
    skips = data.on_error == "skip"
    return {"check_images": data.check_images or skips, "stop_at_mistake": not skips}

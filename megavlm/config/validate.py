"""What one field of a recipe cannot tell alone: numbers out of range, contradictions, files that are not there.

The first of three questions, in the order in which the answers become known: `validate_recipe` needs nothing but the
recipe and the disk, `validate_layout` the world size, `validate_model` the sizes in config.json (both in `fit.py`, and
importable from here). Each raises on the first mistake that it finds, before anything is built.
"""

import glob
import re
from pathlib import Path

from megavlm.config.backends import check_backend
from megavlm.config.fit import validate_layout, validate_model
from megavlm.config.layout import divisors, language_pipeline_size, parse_pipeline_layout
from megavlm.config.learning import check_learning
from megavlm.config.mixture import check_mixture
from megavlm.config.numerics import check_numerics
from megavlm.config.objectives import check_objective
from megavlm.config.placement import check_placement
from megavlm.config.ranges import LEAST, check_numbers
from megavlm.config.rope import check_rope
from megavlm.config.schema import DataConfig, ParallelConfig, Recipe
from megavlm.config.speed import check_speed
from megavlm.config.tasks import check_boxes, check_masks, check_tasks
from megavlm.config.tokens import check_tokens
from megavlm.config.tuning import check_tuning
from megavlm.errors import UseError, use_error

__all__ = ["LEAST", "RECOMPUTE_MODULES", "validate_layout", "validate_model", "validate_recipe"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MOST_IMAGE_PIXELS = 2 * 89_478_485  # PIL raises DecompressionBombError above it
RECOMPUTE_MODULES = ("core_attn", "mlp", "moe", "layernorm")


def validate_recipe(recipe: Recipe, check_paths: bool = True) -> None:
    """Check what can be checked without the world size and the model: numbers, contradictions, files on disk.

    Args:
        recipe: what is to be checked.
        check_paths: whether models and rows must be there; not where the run starts on other machines.

    Raises:
        UseError: the first mistake found, by key.
    """
    check_numbers(recipe)
    _check_name(recipe)
    _check_model(recipe)
    check_rope(recipe.model.rope_scaling)
    check_numerics(recipe)
    check_placement(recipe.parallel)
    _check_pipeline(recipe.parallel)
    _check_tensor_parallel(recipe.parallel)
    _check_overlap(recipe.parallel)
    _check_recompute(recipe.parallel)
    _check_duration(recipe)
    _check_schedule(recipe)
    check_tuning(recipe)
    check_learning(recipe)
    check_speed(recipe)
    check_mixture(recipe)
    _check_data(recipe)
    _check_media_limits(recipe.data)
    check_tokens(recipe.data)
    check_objective(recipe)
    check_tasks(recipe)
    check_boxes(recipe)
    check_masks(recipe)
    if check_paths:
        _check_paths(recipe)


def _check_name(recipe: Recipe) -> None:
    if not _NAME.fullmatch(recipe.name):
        raise use_error(
            "name", f"`{recipe.name}`", "a plain folder name (letters, digits, `.`, `_`, `-`)", "e.g. name: sft-01"
        )
    if not recipe.output_dir:
        raise use_error("output_dir", "nothing", "a folder", "e.g. output_dir: runs")


def _check_model(recipe: Recipe) -> None:
    if not recipe.model.hf_dir:
        raise use_error("model.hf_dir", "nothing", "a Hugging Face directory", "set model.hf_dir")
    check_backend(recipe)
    for name in ("attention_dropout", "hidden_dropout"):
        dropout = vars(recipe.model)[name]
        if dropout > 0 and recipe.parallel.context_parallel_size > 1:
            raise use_error(
                f"model.{name}",
                f"{dropout} with context_parallel_size {recipe.parallel.context_parallel_size}",
                "no dropout under context parallelism",
                f"set model.{name}=0 or parallel.context_parallel_size=1",
            )


def _check_pipeline(parallel: ParallelConfig) -> None:
    pipeline, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if virtual > 1 and pipeline == 1:
        raise use_error(
            "parallel.virtual_pipeline_model_parallel_size",
            f"{virtual} without a pipeline",
            "1, or a pipeline of 2 or more",
            "set parallel.virtual_pipeline_model_parallel_size=1 or parallel.pipeline_model_parallel_size=2",
        )
    if parallel.pipeline_model_parallel_layout:
        num_stages = language_pipeline_size(parallel) * virtual
        parse_pipeline_layout(parallel.pipeline_model_parallel_layout, None, num_stages)


def _check_tensor_parallel(parallel: ParallelConfig) -> None:
    tensor = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and tensor == 1:
        raise use_error(
            "parallel.sequence_parallel",
            "true with tensor_model_parallel_size 1",
            "tensor parallel ranks to share the sequence",
            "set parallel.sequence_parallel=false or parallel.tensor_model_parallel_size=2",
        )
    vision = parallel.vision_tensor_model_parallel_size
    if vision not in (0, 1, tensor) and parallel.vision_placement != "own_ranks":
        raise use_error(
            "parallel.vision_tensor_model_parallel_size",
            vision,
            f"0, 1 or tensor_model_parallel_size ({tensor})",
            "set it to 0 for the same as the language model's",
        )


def _check_overlap(parallel: ParallelConfig) -> None:
    if not parallel.overlap_param_gather:
        return
    for name in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if not vars(parallel)[name]:
            raise use_error(
                "parallel.overlap_param_gather",
                f"true with {name} false",
                "use_distributed_optimizer and overlap_grad_reduce too",
                f"set parallel.{name}=true or parallel.overlap_param_gather=false",
            )


def _check_recompute(parallel: ParallelConfig) -> None:
    key = "parallel.recompute_modules"
    for module in parallel.recompute_modules:
        if module not in RECOMPUTE_MODULES:
            raise use_error(key, f"`{module}`", f"any of {', '.join(RECOMPUTE_MODULES)}", "remove it")
    if parallel.recompute_granularity == "selective" and not parallel.recompute_modules:
        raise use_error(key, "an empty list", f"any of {', '.join(RECOMPUTE_MODULES)}", f"set {key}=core_attn")
    if parallel.recompute_granularity != "full" and parallel.recompute_num_layers > 1:
        raise use_error(
            "parallel.recompute_num_layers",
            f"{parallel.recompute_num_layers} with recompute_granularity {parallel.recompute_granularity}",
            "recompute_granularity full (nothing else takes a number of layers)",
            "set parallel.recompute_granularity=full or parallel.recompute_num_layers=1",
        )


def _check_duration(recipe: Recipe) -> None:
    train = recipe.train
    if (train.train_iters > 0) == (train.num_train_epochs > 0):
        both = train.train_iters > 0
        raise use_error(
            "train.train_iters",
            f"{train.train_iters} and num_train_epochs {train.num_train_epochs}",
            "exactly one of the two above 0",
            "set one of them to 0" if both else "set e.g. train.num_train_epochs=1",
        )
    if train.global_batch_size % train.micro_batch_size != 0:
        raise use_error(
            "train.micro_batch_size",
            train.micro_batch_size,
            f"a divisor of global_batch_size {train.global_batch_size}",
            f"use one of {divisors(train.global_batch_size)}",
        )


def _check_schedule(recipe: Recipe) -> None:
    optimizer, train_iters = recipe.optimizer, recipe.train.train_iters
    if optimizer.lr_warmup_fraction > 0 and optimizer.lr_warmup_iters > 0:
        raise use_error(
            "optimizer.lr_warmup_iters",
            f"{optimizer.lr_warmup_iters} and lr_warmup_fraction {optimizer.lr_warmup_fraction}",
            "at most one of the two",
            "set one of them to 0",
        )
    if (optimizer.lr_decay_style == "WSD") != (optimizer.lr_wsd_decay_iters > 0):
        raise use_error(
            "optimizer.lr_wsd_decay_iters",
            f"{optimizer.lr_wsd_decay_iters} with lr_decay_style {optimizer.lr_decay_style}",
            "above 0 with WSD, and 0 with any other style",
            "set both optimizer.lr_decay_style=WSD and the steps of its final decay, or neither",
        )
    busy = optimizer.lr_warmup_iters + optimizer.lr_wsd_decay_iters
    if 0 < train_iters < busy:
        raise use_error(
            "optimizer.lr_warmup_iters",
            f"{busy} steps of warm-up and final decay in a run of {train_iters}",
            f"at most {train_iters}",
            "lower lr_warmup_iters or lr_wsd_decay_iters, or raise train.train_iters",
        )
    if optimizer.min_lr > optimizer.lr:
        raise use_error("optimizer.min_lr", optimizer.min_lr, f"at most optimizer.lr {optimizer.lr}", "lower min_lr")


def _check_data(recipe: Recipe) -> None:
    data, train = recipe.data, recipe.train
    if data.packing_length and not data.packing:
        raise use_error(
            "data.packing_length",
            f"{data.packing_length} without data.packing",
            "data.packing=true",
            "set data.packing=true or data.packing_length=0",
        )
    if data.pad_to_packing_length and not data.packing:
        raise use_error(
            "data.pad_to_packing_length",
            "true without data.packing",
            "data.packing=true",
            "set data.packing=true or data.pad_to_packing_length=false",
        )
    if data.packing and 0 < data.packing_length < data.max_length:
        raise use_error(
            "data.packing_length",
            data.packing_length,
            f"at least data.max_length {data.max_length}: a row has to hold the longest sample",
            f"set data.packing_length={data.max_length} or lower data.max_length",
        )
    if data.packing and train.micro_batch_size != 1:
        raise use_error(
            "train.micro_batch_size",
            f"{train.micro_batch_size} with data.packing",
            "1: with packing, rows are filled by length and cost, not by number",
            "set train.micro_batch_size=1 or data.packing=false",
        )
    if 0 < data.max_pixels < data.min_pixels:
        raise use_error(
            "data.min_pixels", data.min_pixels, f"at most data.max_pixels {data.max_pixels}", "lower min_pixels"
        )
    for name in ("augment_crop_min_area", "augment_color_jitter", "augment_flip_probability"):
        if vars(data)[name] > 1:
            raise use_error(f"data.{name}", vars(data)[name], "at most 1", f"set data.{name}=1 or less")
    if data.jpeg_draft and data.image_backend == "dali":
        raise use_error(
            "data.jpeg_draft", "true with data.image_backend=dali", "data.image_backend=pil", "set one of the two"
        )
    if data.dali_device == "gpu" and data.image_backend == "pil":
        raise use_error(
            "data.dali_device", "gpu with data.image_backend=pil", "data.image_backend=dali", "set one of the two"
        )
    if recipe.checkpoint.keep_best and not data.eval:
        raise use_error(
            "checkpoint.keep_best", f"{recipe.checkpoint.keep_best} without data.eval", "held-out rows", "set data.eval"
        )
    for name in ("eval_steps", "eval_iters"):
        if vars(train)[name] > 0 and not data.eval:
            raise use_error(
                f"train.{name}", f"{vars(train)[name]} without data.eval", "held-out rows", "set data.eval=rows.jsonl"
            )


def _check_media_limits(data: DataConfig) -> None:
    if data.max_image_pixels > _MOST_IMAGE_PIXELS:
        raise use_error(
            "data.max_image_pixels",
            data.max_image_pixels,
            f"at most {_MOST_IMAGE_PIXELS}, from where PIL refuses images",
            f"set data.max_image_pixels={_MOST_IMAGE_PIXELS}, and shrink larger images",
        )
    if data.root and data.image_dir and not Path(data.image_dir).resolve().is_relative_to(Path(data.root).resolve()):
        raise use_error(
            "data.image_dir", f"`{data.image_dir}`, outside of data.root `{data.root}`", "a folder in it", "correct one"
        )


def _check_paths(recipe: Recipe) -> None:
    """What the recipe names is there, and of the right kind; relative paths start at the working directory."""
    folders = {"model.hf_dir": recipe.model.hf_dir}
    folders |= {"data.image_dir": recipe.data.image_dir} if recipe.data.image_dir else {}
    folders |= {"data.root": recipe.data.root} if recipe.data.root else {}
    folders |= {"checkpoint.load_dir": recipe.checkpoint.load_dir} if recipe.checkpoint.load_dir else {}
    for key, folder in folders.items():
        if not Path(folder).is_dir():
            raise _path_error(key, folder, "a directory")
    lists = {"data.train": recipe.data.train, "data.eval": recipe.data.eval}
    lists |= {f"data.mixture[{number}].paths": source.paths for number, source in enumerate(recipe.data.mixture)}
    for key, files in lists.items():
        for number, file in enumerate(files):
            # What is in a folder, and of which kind files are, is found when they are read.
            if not Path(file).exists() and not (glob.has_magic(file) and glob.glob(file, recursive=True)):
                raise _path_error(f"{key}[{number}]", file, "a file or folder of rows, or a pattern of such names")
    for folder in (recipe.output_dir, recipe.run_dir):
        if Path(folder).exists() and not Path(folder).is_dir():
            raise _path_error("output_dir", folder, "a folder, or nothing yet")


def _path_error(key: str, path: str, expected: str) -> UseError:
    found = Path(path)
    kind = "a directory" if found.is_dir() else "a file" if found.exists() else "which does not exist"
    fix = "correct the path" if found.is_absolute() else f"it is relative to {Path.cwd()}: correct the path"
    if key == "model.hf_dir" and not found.exists():
        fix += ", or download the model first"
    return use_error(key, f"`{path}`, {kind}", expected, fix)

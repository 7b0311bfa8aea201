"""Between Hugging Face directories and native checkpoints, in one process."""

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megavlm.checkpoint import native, writing
from megavlm.checkpoint.adapters import AdapterCheckpoint, fill_models, open_checkpoint, write_adapter
from megavlm.checkpoint.hf_config import (
    EMBEDDING_KEY,
    MASK_KEY,
    add_to_config,
    write_chat_template,
    write_config,
    write_reward_config,
)
from megavlm.checkpoint.hf_io import DTYPE_NAMES, HFDirectory, copy_companions, make_empty
from megavlm.checkpoint.prefix_adapter import write_prefix
from megavlm.checkpoint.stream_export import export_stream, exported_shapes
from megavlm.checkpoint.stream_import import import_stream
from megavlm.checkpoint.weight_formats import BlockFp8, OneType, fp8_names, quantization_config
from megavlm.errors import RunError, use_error
from megavlm.models.architecture import MaskHeadArchitecture
from megavlm.models.names import Part
from megavlm.parallel.groups import Groups

TIMEOUT_S = 3600


def load_checkpoint_weights(folder: Path, directory: HFDirectory, models: Sequence[Part], groups: Groups) -> int:
    """Fill the parts of a whole model with a native checkpoint's weights, adapters merged; returns its step.

    Raises:
        UseError: the checkpoint is of another model.
    """
    common = checked_common(folder, directory)
    checkpoint = open_checkpoint(folder, directory)
    if isinstance(checkpoint, AdapterCheckpoint):
        fill_models(checkpoint, models)
        return int(common["step"])
    loaded = native.load_sharded(folder, native.model_state(models, groups), TIMEOUT_S)
    native.restore_models(models, loaded)
    return int(common["step"])


def checked_common(folder: Path, directory: HFDirectory) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        UseError: it is of another model.
    """
    common: dict[str, Any] = native.read_common(folder)["common"]
    if common.get("text_changes", {}) != directory.text_changes:
        raise use_error(
            str(folder),
            "a checkpoint of a run with model.rope_scaling, rope_theta or max_position_embeddings of its own",
            f"one of {directory.path} as it is",
            "export it with `megavlm convert export`, and use that directory",
        )
    head, expected = native.head_of(common), directory.architecture.language.head
    if head != expected:
        kinds = {
            "scores": "a reward model",
            "words": "a language model",
            "embeddings": "an embedding model",
            "matches": "an embedding model that matches texts with images",
        }
        raise use_error(
            str(folder),
            f"a checkpoint of {kinds[head]}",
            f"one of {kinds[expected]}, as {directory.path} is",
            "give the Hugging Face directory that it belongs to (of a reward model the exported one)",
        )
    if common["architecture"] != repr(directory.architecture):
        raise use_error(
            str(folder),
            f"a checkpoint of another model (family {common['family']})",
            f"one of {directory.path} (family {directory.family.model_type})",
            "give the Hugging Face directory that the run started from",
        )
    return common


def import_checkpoint(directory: HFDirectory, out_dir: Path) -> Path:
    """Write a directory's weights as a native checkpoint of step 0, without optimizer state.

    Args:
        directory: what to import.
        out_dir: new or empty.

    Raises:
        UseError: out_dir holds files, or tensors are missing or left over.
        RunError: writing failed, e.g. because the disk is full; nothing is left behind.
    """
    directory.check()
    common = {
        "step": 0,
        "family": directory.family.model_type,
        "architecture": repr(directory.architecture),
        "has_score_head": directory.architecture.language.has_score_head,
        "weights_only": True,
    }
    num_bytes = sum(directory.spec(name).num_bytes for entry in directory.entries for name in entry.names)
    with finished(out_dir, num_bytes) as folder:
        writing.write_weights(folder, common, lambda path: import_stream(directory, path))
    return writing.step_folder(out_dir, 0)


def export_checkpoint(folder: Path, directory: HFDirectory, out_dir: Path, dtype: str | None) -> int:
    """Write a native checkpoint as a Hugging Face directory, adapters merged; returns the checkpoint's step.

    Args:
        folder: the checkpoint's step folder.
        directory: the model it started from: config, tokenizer and processor files are copied from there. Where the
            run had a chat template of its own (`data.template`), that is written instead of the directory's. A reward
            model is written without the output layer over words, and with its head for scores. An embedding model is
            written with its head, and with the directory's output layer over words as it is. A head for masks is
            written into `MASK_FILE`.
        out_dir: new or empty.
        dtype: float32, bfloat16, float16, None (what the directory's config says), or fp8: matrices of decoder layers
            in E4M3 with a scale for each 128 x 128 numbers, all else in bfloat16.

    Raises:
        UseError: out_dir holds files, or the checkpoint is of another model.
        RunError: writing failed, e.g. because the disk is full; nothing is left behind.
    """
    directory = _as_trained(directory, folder)
    common = checked_common(folder, directory)
    reader = open_checkpoint(folder, directory)
    wanted = torch.bfloat16 if dtype == "fp8" else DTYPE_NAMES[dtype] if dtype else directory.dtype
    shapes = exported_shapes(reader, directory)
    in_fp8 = _in_fp8(directory, shapes) if dtype == "fp8" else frozenset()
    weight_format = BlockFp8(in_fp8, wanted) if in_fp8 else OneType(wanted)
    num_bytes = sum(math.prod(spec.shape) for spec in reader.specs.values()) * wanted.itemsize
    with finished(out_dir, num_bytes) as unfinished:
        export_stream(reader, directory, unfinished, weight_format)
        copy_companions(directory.path, unfinished)
        write_config(directory, unfinished)
        if common.get("chat_template"):  # else the directory's own, also in imports and older checkpoints
            write_chat_template(unfinished, common["chat_template"], common["eos_token_ids"])
        if directory.architecture.language.has_score_head:
            write_reward_config(unfinished, common.get("stage", ""))
        if common.get("embedding"):
            add_to_config(unfinished, {EMBEDDING_KEY: common["embedding"]})
        if common.get("mask_head"):
            add_to_config(unfinished, {MASK_KEY: common["mask_head"]})
        if in_fp8:
            add_to_config(unfinished, {"quantization_config": quantization_config(in_fp8, shapes)})
    return int(common["step"])


def _as_trained(directory: HFDirectory, folder: Path) -> HFDirectory:
    """A directory as the model that a checkpoint of it has become."""
    common = native.read_common(folder)["common"]
    head = native.head_of(common)
    if head == "scores":
        directory = directory.as_reward_model()
    elif head != "words":
        directory = directory.as_embedding_model(common["embedding"]["size"], head == "matches")
    if common.get("mask_head"):
        directory = directory.with_mask_head(MaskHeadArchitecture(**common["mask_head"]))
    return directory.with_text_changes(common.get("text_changes", {}))


def _in_fp8(directory: HFDirectory, shapes: dict[str, tuple[int, ...]]) -> frozenset[str]:
    """What is written in FP8."""
    if directory.architecture.language.experts is not None:
        raise use_error(
            "--dtype",
            "fp8 for a mixture of experts",
            "a model with dense layers: how experts lie in FP8 directories is not settled between readers",
            "export --dtype bfloat16, and quantise with the inference engine",
        )
    names = fp8_names(directory.entries, shapes)
    if not names:
        raise use_error(
            "--dtype", "fp8", "decoder matrices whose sides are multiples of 128", "export --dtype bfloat16"
        )
    return names


def export_adapter(folder: Path, directory: HFDirectory, out_dir: Path, dtype: str | None) -> int:
    """Write what a run with adapters has learned as a folder in peft's format; returns the checkpoint's step.

    Args:
        folder: the checkpoint's step folder.
        directory: the model that it started from.
        out_dir: new or empty.
        dtype: float32, bfloat16, float16, or None: as it was trained.

    Raises:
        UseError: out_dir holds files, the checkpoint has no adapters, is of a model with a head for embeddings or
            masks, or of another model.
        RunError: writing failed.
    """
    directory = _as_trained(directory, folder)
    common = checked_common(folder, directory)
    if common.get("embedding") or common.get("mask_head"):
        raise use_error(
            "--adapter-only",
            f"{folder}, of {'an embedding model' if common.get('embedding') else 'a model with a head for masks'}",
            "an export of all weights: the head learns beside the adapters",
            "leave it out",
        )
    checkpoint = open_checkpoint(folder, directory, merges=False)
    if not isinstance(checkpoint, AdapterCheckpoint):
        raise use_error(
            "--adapter-only", f"{folder}, which has no adapters", "a checkpoint of a run with peft", "leave it out"
        )
    is_prefix = checkpoint.methods == {"prefix"}
    if not is_prefix:
        checkpoint.check_merges()
    num_bytes = sum(checkpoint.learned.specs[one.native].num_bytes for one in checkpoint.tensors)
    with finished(out_dir, num_bytes) as unfinished:
        write = write_prefix if is_prefix else write_adapter
        write(checkpoint, unfinished, DTYPE_NAMES[dtype] if dtype else None)
    return int(common["step"])


@contextlib.contextmanager
def finished(out_dir: Path, num_bytes: int) -> Iterator[Path]:
    """A folder that becomes `out_dir` when all has gone well, and is removed otherwise.

    Raises:
        UseError: out_dir holds files, or the disk has less than `num_bytes` free.
        RunError: writing failed.
    """
    make_empty(out_dir)
    parent = out_dir.absolute().parent
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise use_error(
            str(out_dir), f"{free / 1e9:.2f} GB free", f"{num_bytes / 1e9:.2f} GB for the weights", "free some space"
        )
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=parent) as folder:
            unfinished = Path(folder) / out_dir.name
            unfinished.mkdir()
            yield unfinished
            unfinished.rename(out_dir)  # over the empty directory
    except (OSError, RuntimeError) as error:
        raise RunError(f"cannot write {out_dir}: {error}; nothing is left of it; is the disk full?") from error

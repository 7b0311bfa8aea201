"""Hugging Face directories: read tensors into any layout, write a directory that transformers loads.

Tensors are read one at a time through safetensors (never pickle).
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megavlm.errors import UseError, use_error
from megavlm.models.architecture import Architecture
from megavlm.models.encoder import VisionEncoder
from megavlm.models.family import ModelFamily
from megavlm.models.names import Part, named_parameters
from megavlm.models.registry import family_of
from megavlm.models.weight_map import Entry, check_names

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Copied verbatim when a directory is exported: re-serialised, they would move keys that other readers look for.
COMPANIONS = (
    "config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model vocab.json merges.txt "
    "special_tokens_map.json added_tokens.json chat_template.jinja chat_template.json processor_config.json "
    "preprocessor_config.json video_preprocessor_config.json"
).split()

DTYPE_NAMES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class HFDirectory:
    """A Hugging Face model directory, opened for reading.

    Raises:
        UseError: a file is missing or unreadable, or the model type is unknown.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_json(self.path / "config.json")
        self.family: ModelFamily = family_of(self.config.get("model_type", ""))
        try:
            self.architecture: Architecture = self.family.read_config(self.config)
        except KeyError as error:
            raise use_error(
                str(self.path / "config.json"), f"no key {error}", f"a {self.family.model_type} config", "complete it"
            ) from error
        self.entries: list[Entry] = self.family.weight_map(self.architecture)
        self._files = self._locate()

    def _locate(self) -> dict[str, tuple[Path, str]]:
        """Canonical tensor name to (file, name in the file)."""
        if (self.path / INDEX).is_file():
            files = sorted({self.path / name for name in read_json(self.path / INDEX)["weight_map"].values()})
        elif (self.path / SINGLE).is_file():
            files = [self.path / SINGLE]
        else:
            raise use_error(
                str(self.path), "no weights", f"{SINGLE} or {INDEX}", "give a directory with safetensors weights"
            )
        located: dict[str, tuple[Path, str]] = {}
        for file in files:
            with open_safetensors(file) as handle:
                for name in handle.keys():  # noqa: SIM118  (not a dict)
                    located[self.family.public_name(name)] = (file, name)
        return located

    @property
    def names(self) -> list[str]:
        """Canonical names of all tensors."""
        return list(self._files)

    @property
    def ignored(self) -> list[str]:
        """Tensors that a tied model may carry a second time."""
        heads = ("lm_head.weight", "language_model.lm_head.weight")
        return list(heads) if self.architecture.language.tied_embeddings else []

    @property
    def dtype(self) -> torch.dtype:
        """Type the weights are stored in, as the config says (fp32 where it says nothing)."""
        text = self.config.get("text_config", {})
        name = self.config.get("dtype") or self.config.get("torch_dtype") or text.get("dtype") or "float32"
        return DTYPE_NAMES[name]

    def check(self) -> None:
        """Raise `UseError` unless every tensor that the map wants is there and none is left over."""
        check_names(self.entries, self.names, self.ignored, str(self.path))

    def read(self, name: str) -> torch.Tensor:
        """One tensor by its canonical name."""
        file, stored = self._files[name]
        with open_safetensors(file) as handle:
            return handle.get_tensor(stored)

    def read_native(self, entry: Entry) -> torch.Tensor:
        """One whole native parameter."""
        return entry.to_native([self.read(name) for name in entry.names])


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or raise `UseError` naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise use_error(
            str(path), "no such file", "a Hugging Face model directory", "check model.hf_dir / the path"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise use_error(str(path), f"broken JSON ({error})", "a JSON object", "restore the file") from error
    if not isinstance(content, dict):
        raise use_error(str(path), type(content).__name__, "a JSON object", "restore the file")
    return content


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file, or raise `UseError` naming it."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise use_error(str(path), "no such file", "the shard that the index names", "restore the file") from error
    except (SafetensorError, OSError) as error:
        raise use_error(str(path), f"unreadable ({error})", "a safetensors file", "restore the file") from error


def load_weights(directory: HFDirectory, models: Iterable[Part]) -> None:
    """Fill this rank's parameters from a directory, each rank reading only what it holds.

    Raises:
        UseError: names or shapes do not fit the config.
    """
    directory.check()
    by_native = {entry.native: entry for entry in directory.entries}
    with torch.no_grad():
        for model in models:
            for name, parameter in named_parameters(model):
                entry = by_native[_tied_name(name, model)]
                whole = directory.read_native(entry)
                part = _shard(whole, parameter, entry, model)
                if part.shape != parameter.shape:
                    raise use_error(
                        f"{directory.path} {entry.names[0]}",
                        f"a part of shape {tuple(part.shape)}",
                        f"{tuple(parameter.shape)} as config.json says",
                        "config and weights must belong together",
                    )
                parameter.copy_(part)


def _tied_name(name: str, model: Part) -> str:
    tied = not isinstance(model, VisionEncoder) and model.share_embeddings_and_output_weights
    if name == "language.output_layer.weight" and tied:
        return "language.embedding.word_embeddings.weight"
    return name


def _shard(whole: torch.Tensor, parameter: torch.nn.Parameter, entry: Entry, model: Part) -> torch.Tensor:
    """Cut this tensor-parallel rank's part. Megatron-Core marks its sharded parameters with these attributes."""
    marks = vars(parameter)
    if not marks.get("tensor_model_parallel", False):
        return whole
    group = model.groups.vision.tp if isinstance(model, VisionEncoder) else model.groups.tensor
    dimension, size, rank = marks["partition_dim"], group.size(), group.rank()
    if entry.halves:
        return torch.cat([half.chunk(size, dimension)[rank] for half in whole.chunk(2, dimension)], dimension)
    return whole.chunk(size, dimension)[rank]


def export_weights(
    entries: Iterable[Entry],
    native: Mapping[str, torch.Tensor] | Callable[[str], torch.Tensor],
    source: HFDirectory,
    out_dir: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write a Hugging Face directory.

    Args:
        entries: the family's map.
        native: whole native parameters by name.
        source: the directory whose config, tokenizer and processor files belong to the model.
        out_dir: must not exist or be empty: a stale shard beside new ones would be loaded.
        dtype: of the written weights; None: as the source's config says.
        max_shard_bytes: a new shard is begun before this size is passed.

    Raises:
        UseError: out_dir holds files already.
    """
    make_empty(out_dir)
    get = native if callable(native) else native.__getitem__
    dtype = dtype or source.dtype
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for entry in entries:
        for name, tensor in zip(entry.names, entry.to_hf(get(entry.native)), strict=True):
            tensor = tensor.to(dtype).contiguous()
            if size and size + tensor.nbytes > max_shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = tensor.clone()
            size += tensor.nbytes
    _write_shards(shards, out_dir)
    copy_companions(source.path, out_dir)


def write_tensors(tensors: Iterable[tuple[str, torch.Tensor]], out_dir: Path, max_shard_bytes: int = 5 * 2**30) -> None:
    """Write named tensors as safetensors, a shard of them in memory at a time.

    Args:
        tensors: each once.
        out_dir: an existing directory.
        max_shard_bytes: a new shard is begun before this size is passed.
    """
    shard: dict[str, torch.Tensor] = {}
    names: list[list[str]] = []
    size, total, num_parameters = 0, 0, 0

    def flush() -> None:
        save_file(shard, out_dir / f"part-{len(names)}.safetensors", metadata={"format": "pt"})
        names.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            flush()
            size = 0
        shard[name] = tensor.contiguous()
        size, total, num_parameters = size + tensor.nbytes, total + tensor.nbytes, num_parameters + tensor.numel()
    flush()
    if len(names) == 1:
        (out_dir / "part-0.safetensors").rename(out_dir / SINGLE)
        return
    weight_map = {}
    for number, part in enumerate(names):
        file = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (out_dir / f"part-{number}.safetensors").rename(out_dir / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_parameters": num_parameters, "total_size": total}, "weight_map": weight_map}
    (out_dir / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shards(shards: list[dict[str, torch.Tensor]], out_dir: Path) -> None:
    if len(shards) == 1:
        save_file(shards[0], out_dir / SINGLE, metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out_dir / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    tensors = [tensor for shard in shards for tensor in shard.values()]
    metadata = {
        "total_parameters": sum(tensor.numel() for tensor in tensors),
        "total_size": sum(tensor.nbytes for tensor in tensors),
    }
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2)
    (out_dir / INDEX).write_text(text + "\n", encoding="utf-8")


def make_empty(out_dir: Path) -> None:
    """Create a directory, or raise `UseError` when it holds anything."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UseError(
            f"{out_dir}: got a path that is not empty; expected a new or empty directory; fix: choose another, or "
            "remove it (a stale shard beside new ones would be loaded)"
        )
    out_dir.mkdir(parents=True, exist_ok=True)


def copy_companions(source: Path, out_dir: Path) -> None:
    """Copy config, tokenizer, template and processor files as they are."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, out_dir / name)

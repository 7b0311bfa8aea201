"""Hugging Face directories: read tensors into any layout, write a directory that transformers loads.

Tensors are read one at a time through safetensors (never pickle).
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file

from megavlm.checkpoint.pickle_reader import PickleFile
from megavlm.checkpoint.safetensors_reader import SafetensorsFile
from megavlm.checkpoint.safetensors_writer import TensorSpec
from megavlm.config.schema import ModelConfig
from megavlm.errors import UseError, use_error
from megavlm.models.architecture import Architecture, MaskHeadArchitecture
from megavlm.models.embedding_head import EMBEDDING_NAMES, MATCH_NAMES, embedding_entries
from megavlm.models.family import ModelFamily
from megavlm.models.mask_head import NAMES as MASK_NAMES
from megavlm.models.mask_head import mask_entries
from megavlm.models.registry import family_of
from megavlm.models.rope_config import rope_changes, with_text
from megavlm.models.score import HF_NAME, NATIVE_NAME, score_entries
from megavlm.models.weight_map import Entry, check_names

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
MASK_FILE = "mask_head/model.safetensors"
"""A head for masks lies in a folder of its own: what reads the model otherwise knows none of its tensors."""

# Copied verbatim when a directory is exported: re-serialised, they would move keys that other readers look for.
COMPANIONS = (
    "config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model vocab.json merges.txt "
    "special_tokens_map.json added_tokens.json chat_template.jinja chat_template.json processor_config.json "
    "preprocessor_config.json video_preprocessor_config.json"
).split()

PLAIN_MODEL = ModelConfig()  # changes nothing
_MASK_WIDTH_OF = "mask_head.image.weight"
_WORDS = ("lm_head.weight", "language_model.lm_head.weight")  # names of the output layer over words

DTYPE_NAMES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class HFDirectory:
    """A Hugging Face model directory, opened for reading.

    With `allow_pickle`, weights that torch.save wrote are read where there are no others. With `reward_model` it is
    that of one: without a head for scores it gets a new one, and its output layer over words is not read. A directory
    that has such a head is a reward model's in any case. With `embedding_dim` it is that of an embedding model, in the
    same way; without, a head for embeddings that it may have is not read. With `matches` that model also tells whether
    a text belongs to images. With `mask_head` the model has such a head beside its output layer: the directory's, in
    `MASK_FILE`, or a new one; without, one that is there is not read. `text_changes` are other values of the config's
    text part (`rope_changes`).

    Raises:
        UseError: a file is missing or unreadable, or the model type is unknown.
    """

    def __init__(
        self,
        path: str | Path,
        allow_pickle: bool = False,
        reward_model: bool = False,
        text_changes: Mapping[str, Any] = MappingProxyType({}),
        embedding_dim: int = 0,
        matches: bool = False,
        mask_head: MaskHeadArchitecture | None = None,
    ) -> None:
        self.path, self._allow_pickle, self.text_changes = Path(path), allow_pickle, dict(text_changes)
        self.config = with_text(read_json(self.path / "config.json"), self.text_changes)
        self.family: ModelFamily = family_of(self.config.get("model_type", ""))
        self.architecture: Architecture = _architecture_of(self.config, self.path / "config.json")
        self.entries: list[Entry] = self.family.weight_map(self.architecture)
        self._handles: dict[Path, SafetensorsFile | PickleFile] = {}
        self._files = self._locate()
        if reward_model or HF_NAME in self._files:
            language = dataclasses.replace(self.architecture.language, has_score_head=True)
            self.architecture = dataclasses.replace(self.architecture, language=language)
            self.entries = score_entries(self.entries)
        elif embedding_dim:
            language = dataclasses.replace(
                self.architecture.language, embedding_dim=embedding_dim, has_match_head=matches
            )
            self.architecture = dataclasses.replace(self.architecture, language=language)
            self.entries = embedding_entries(self.entries, matches)
        if mask_head is not None:
            language = dataclasses.replace(self.architecture.language, mask_head=mask_head)
            self.architecture = dataclasses.replace(self.architecture, language=language)
            self.entries = mask_entries(self.entries)

    def as_embedding_model(self, embedding_dim: int, matches: bool = False) -> "HFDirectory":
        """The same directory as the start of an embedding model, and of one that `matches` texts with images."""
        return HFDirectory(self.path, self._allow_pickle, False, self.text_changes, embedding_dim, matches)

    def with_mask_head(self, mask_head: MaskHeadArchitecture) -> "HFDirectory":
        """The same directory, of a model that tells masks."""
        return HFDirectory(self.path, self._allow_pickle, text_changes=self.text_changes, mask_head=mask_head)

    def as_reward_model(self) -> "HFDirectory":
        """The same directory as the start of a reward model."""
        return HFDirectory(self.path, self._allow_pickle, reward_model=True, text_changes=self.text_changes)

    def with_text_changes(self, text_changes: Mapping[str, Any]) -> "HFDirectory":
        """The same directory with other values of its config's text part."""
        if text_changes == self.text_changes:
            return self
        language = self.architecture.language
        heads = language.has_score_head, text_changes, language.embedding_dim, language.has_match_head
        return HFDirectory(self.path, self._allow_pickle, *heads, language.mask_head)

    def check_has_words(self, wanted: str) -> None:
        """Raise `UseError` when this is a reward model's, which cannot do what is `wanted`."""
        if self.architecture.language.has_score_head:
            raise use_error(
                str(self.path), f"a reward model for {wanted}", "an output layer over words", "give another directory"
            )

    @property
    def new_names(self) -> list[str]:
        """What the model's heads have in place of words, where they are not in the files: the caller fills them."""
        embeds, matches = list(EMBEDDING_NAMES.values()), list(MATCH_NAMES.values())
        heads = {"words": [], "scores": [[HF_NAME]], "embeddings": [embeds], "matches": [embeds, matches]}
        missing = [names for names in heads[self.architecture.language.head] if not set(names) & set(self._files)]
        return [name for names in missing for name in names]

    @property
    def new_mask_names(self) -> list[str]:
        """What the model's head for masks has, if it is not in the files: the caller fills it."""
        is_new = self.architecture.language.mask_head is not None and not self.stored_mask_width
        return list(MASK_NAMES) if is_new else []

    @property
    def stored_mask_width(self) -> int:
        """Width of the vectors of a head for masks that is in the files; 0: there is none."""
        return self.spec(_MASK_WIDTH_OF).shape[0] if _MASK_WIDTH_OF in self._files else 0

    def _locate(self) -> dict[str, tuple[Path, str]]:
        """Canonical tensor name to (file, name in the file)."""
        located: dict[str, tuple[Path, str]] = {}
        beside = [self.path / MASK_FILE] if (self.path / MASK_FILE).is_file() else []
        for file in [*weight_files(self.path, self._allow_pickle), *beside]:
            self._handles[file] = SafetensorsFile(file) if file.suffix == ".safetensors" else PickleFile(file)
            for name in self._handles[file].names:
                located[self.family.public_name(name)] = (file, name)
        return located

    @property
    def names(self) -> list[str]:
        """Canonical names of all tensors."""
        return list(self._files)

    @property
    def ignored(self) -> list[str]:
        """Tensors that a tied model may carry a second time, or that belong to another head than the model's."""
        language = self.architecture.language
        words = list(_WORDS) if language.tied_embeddings or language.head != "words" else []
        masks = list(MASK_NAMES) if language.mask_head is None else []
        embeds = list(EMBEDDING_NAMES.values()) if language.head == "words" else []
        matches = list(MATCH_NAMES.values()) if language.head in ("words", "embeddings") else []
        return words + embeds + matches + masks

    @property
    def stored_embedding_dim(self) -> int:
        """Width of the embeddings of a head that is in the files; 0: there is none."""
        name = EMBEDDING_NAMES[NATIVE_NAME]
        return self.spec(name).shape[0] if name in self._files else 0

    @property
    def stores_match_head(self) -> bool:
        """Whether a head that tells texts that belong to images from others is in the files."""
        return bool(set(MATCH_NAMES.values()) & set(self._files))

    @property
    def carried(self) -> list[str]:
        """Tensors that an embedding model does not read, and that are copied when it is exported."""
        language = self.architecture.language
        if not language.embedding_dim or language.tied_embeddings:
            return []
        return [name for name in _WORDS if name in self._files]

    @property
    def dtype(self) -> torch.dtype:
        """Type the weights are stored in, as the config says (fp32 where it says nothing)."""
        text = self.config.get("text_config", {})
        name = self.config.get("dtype") or self.config.get("torch_dtype") or text.get("dtype") or "float32"
        if name not in DTYPE_NAMES:
            raise use_error(
                f"{self.path / 'config.json'} dtype", name, f"one of {', '.join(DTYPE_NAMES)}", "correct it"
            )
        return DTYPE_NAMES[name]

    def check(self) -> None:
        """Raise `UseError` unless every tensor that the map wants is there and none is left over."""
        new = [*self.new_names, *self.new_mask_names]
        check_names(self.entries, [*self.names, *new], self.ignored, str(self.path))

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """One tensor by its canonical name, or one row of its first dimension."""
        file, stored = self._files[name]
        return self._handles[file].read(stored, row)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with a tensor's bytes from `start` on; both are multiples of its type's size."""
        file, stored = self._files[name]
        self._handles[file].read_into(stored, start, buffer)

    def spec(self, name: str) -> TensorSpec:
        """Shape and type of a tensor, without reading it."""
        file, stored = self._files[name]
        return self._handles[file].spec(stored)

    def read_parts(self, entry: Entry, expert: int | None = None) -> list[torch.Tensor]:
        """The whole tensors that a native one is made of; of an expert, its native matrix."""
        if expert is None:
            return [self.read(name) for name in entry.names]
        return [self.read_native(entry, expert)]

    def read_native(self, entry: Entry, expert: int | None = None) -> torch.Tensor:
        """One whole native tensor, or one expert's part of it."""
        if expert is None:
            return entry.to_native([self.read(name) for name in entry.names])
        return entry.to_native([self.read(name, expert) for name in entry.names])[0]


def read_architecture(folder: Path, model: ModelConfig = PLAIN_MODEL) -> Architecture:
    """What a model is, from its config.json alone, and what a recipe changes of it: weights need not be there.

    Raises:
        UseError: an unknown model type, a key that is missing, or a value that makes no model.
    """
    path = folder / "config.json"
    config = with_text(read_json(path), read_rope_changes(folder, model))
    return _architecture_of(config, path)


def read_rope_changes(folder: Path, model: ModelConfig) -> dict[str, Any]:
    """What a recipe changes of the text part of a directory's config.json (`rope_changes`)."""
    path = folder / "config.json"
    config = read_json(path)
    return rope_changes(config, _architecture_of(config, path).language, model)


def _architecture_of(config: dict[str, Any], path: Path) -> Architecture:
    family = family_of(config.get("model_type", ""))
    expected = f"a {family.model_type} config"
    try:
        architecture = family.read_config(config)
    except KeyError as error:
        raise use_error(str(path), f"no key {error}", expected, "complete it") from error
    except UseError:
        raise
    except (TypeError, AttributeError, ArithmeticError, ValueError) as error:
        raise use_error(str(path), f"a value that makes no model ({error})", expected, "restore the file") from error
    for part in (architecture.vision, architecture.language):
        for name, value in vars(part).items():
            is_size = name.endswith("_size") or (name.startswith("num_") and name != "num_positions")
            if is_size and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                where = f"{type(part).__name__}.{name}"
                raise use_error(f"{path} ({where})", repr(value), "a whole number of at least 1", "restore the file")
    return architecture


def weight_files(folder: Path, allow_pickle: bool = False) -> list[Path]:
    """The safetensors files of a directory; if it has none, and they are allowed, those of torch.save.

    Raises:
        UseError: there are none, or the index names files elsewhere.
    """
    for index, single in ((INDEX, SINGLE), *([(PICKLE_INDEX, PICKLE_SINGLE)] if allow_pickle else [])):
        if (folder / index).is_file():
            return _indexed(folder / index)
        if (folder / single).is_file():
            return [folder / single]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise use_error(
            str(folder),
            f"weights as pickle ({pickles[0]}), which can run code when it is read",
            f"{SINGLE} or {INDEX}",
            "save the model again with transformers' save_pretrained, or add --allow-pickle to `megavlm convert`",
        )
    raise use_error(str(folder), "no weights", f"{SINGLE} or {INDEX}", "give a directory with safetensors weights")


def _indexed(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise use_error(str(index), "no weight_map", "tensor names and their files", "restore the file")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise use_error(str(index), f"`{outside[0]}`", "names of files beside it", "restore the file")
    return [index.parent / name for name in names]


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


def write_tensors(tensors: Iterable[tuple[str, torch.Tensor]], out_dir: Path, max_shard_bytes: int = 5 * 2**30) -> None:
    """Write named tensors as safetensors, a shard of them in memory at a time.

    Args:
        tensors: each once.
        out_dir: an existing directory.
        max_shard_bytes: a new shard is begun before this size is passed.
    """
    shard: dict[str, torch.Tensor] = {}
    written: list[dict[str, TensorSpec]] = []
    size = 0

    def flush() -> None:
        save_file(shard, out_dir / f"part-{len(written)}.safetensors", metadata={"format": "pt"})
        written.append({name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in shard.items()})
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            flush()
            size = 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    flush()
    if len(written) == 1:
        (out_dir / "part-0.safetensors").rename(out_dir / SINGLE)
        return
    files = []
    for number, specs in enumerate(written):
        files.append((f"model-{number + 1:05d}-of-{len(written):05d}.safetensors", specs))
        (out_dir / f"part-{number}.safetensors").rename(out_dir / files[-1][0])
    (out_dir / INDEX).write_text(index_text(files), encoding="utf-8")


def index_text(files: Iterable[tuple[str, Mapping[str, TensorSpec]]]) -> str:
    """model.safetensors.index.json of some files and their tensors."""
    weight_map: dict[str, str] = {}
    num_parameters = num_bytes = 0
    for file, specs in files:
        weight_map |= dict.fromkeys(specs, file)
        num_parameters += sum(math.prod(spec.shape) for spec in specs.values())
        num_bytes += sum(spec.num_bytes for spec in specs.values())
    metadata = {"total_parameters": num_parameters, "total_size": num_bytes}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"


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

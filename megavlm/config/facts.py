"""What layout checks need to know of a model, read from its `config.json` alone: no torch, no transformers.

Keys that a `config.json` leaves out have the defaults that transformers 5.19 gives them; the literals below are those
of its configuration classes, and a test compares them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.errors import use_error

# Qwen3VLTextConfig.
_QWEN3_VL_TEXT: dict[str, int] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 128000,
}
# Qwen3VLVisionConfig.
_QWEN3_VL_VISION: dict[str, int] = {"depth": 27, "num_heads": 16, "intermediate_size": 4304}
# LlamaConfig; num_key_value_heads and head_dim follow from the others.
_LLAMA: dict[str, int] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
# CLIPVisionConfig (ViT-B/32), for the keys that a vision_config leaves out ...
_CLIP_VISION: dict[str, int] = {"num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
# ... and LlavaConfig's tower (CLIP ViT-L/14, 336 px) where there is no vision_config at all.
_LLAVA_VISION: dict[str, int] = {"num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


@dataclass(frozen=True)
class ModelFacts:
    """The sizes that a layout has to divide.

    Attributes:
        num_layers: decoder layers of the language model.
        num_attention_heads: its query heads.
        num_query_groups: its key-value heads.
        head_dim: channels of one head.
        ffn_hidden_size: inner width of its feed-forward.
        vision_num_layers: layers of the vision tower, as many as the checkpoint holds.
        vision_num_attention_heads: heads of the vision tower.
        vision_ffn_hidden_size: inner width of the vision tower's feed-forward.
        vocab_size: rows of the embedding table.
        max_positions: longest sequence, in tokens, that the language model was made for.
    """

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    vision_num_layers: int
    vision_num_attention_heads: int
    vision_ffn_hidden_size: int
    vocab_size: int
    max_positions: int


@dataclass(frozen=True)
class _Section:
    """One (sub)mapping of a config.json, with defaults for what it leaves out, and its place for errors."""

    values: Mapping[str, Any]
    defaults: Mapping[str, int]
    where: str

    def size(self, key: str) -> int:
        """Return a positive whole number."""
        value = self.values.get(key, self.defaults.get(key))
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise use_error(f"{self.where}.{key}", repr(value), "a whole number of at least 1", "mend config.json")
        return value

    def size_or(self, key: str, default: int) -> int:
        """Return a positive whole number, or `default` where the key is null (or absent, and has no default)."""
        if self.values.get(key, self.defaults.get(key)) is None:
            return default
        return self.size(key)


def read_model_facts(hf_dir: str | Path) -> ModelFacts:
    """Read the sizes of a model from the `config.json` of its Hugging Face directory.

    Raises:
        UseError: no such directory or file, not JSON, an unknown model_type, a size that is missing or no number.
    """
    folder = Path(hf_dir)
    path = folder / "config.json"
    if not folder.is_dir():
        raise use_error(
            "model.hf_dir", f"`{hf_dir}`, no such directory", "a Hugging Face directory on disk", "download it first"
        )
    if not path.is_file():
        raise use_error(
            "model.hf_dir", f"`{hf_dir}` without config.json", "a Hugging Face directory", "give the folder that has it"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise use_error(str(path), f"no JSON ({error})", "a JSON object", "copy or download the file again") from error
    if not isinstance(config, dict):
        raise use_error(str(path), f"a {type(config).__name__}", "a JSON object", "copy or download the file again")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in READERS:
        raise use_error(
            f"{path}: model_type", repr(model_type), f"one of {', '.join(READERS)}", "use a model of these families"
        )
    return READERS[model_type](config, str(path))


def _section(config: Mapping[str, Any], key: str, defaults: Mapping[str, int], where: str) -> _Section:
    """Return a nested mapping of config.json; null or absent is an empty one."""
    values = config.get(key)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise use_error(f"{where}: {key}", f"a {type(values).__name__}", "a JSON object", "mend config.json")
    return _Section(values, defaults, f"{where}: {key}")


def _require_type(section: _Section, expected: str) -> None:
    """LLaVA's parts may be of any architecture; refuse those that we do not build."""
    found = section.values.get("model_type", expected)
    if found != expected:
        raise use_error(f"{section.where}.model_type", repr(found), expected, f"use a model whose part is {expected}")


def _read_qwen3_vl(config: Mapping[str, Any], where: str) -> ModelFacts:
    text = _section(config, "text_config", _QWEN3_VL_TEXT, where)
    vision = _section(config, "vision_config", _QWEN3_VL_VISION, where)
    num_heads = text.size("num_attention_heads")
    return ModelFacts(
        num_layers=text.size("num_hidden_layers"),
        num_attention_heads=num_heads,
        num_query_groups=text.size_or("num_key_value_heads", num_heads),
        head_dim=text.size("head_dim"),
        ffn_hidden_size=text.size("intermediate_size"),
        vision_num_layers=vision.size("depth"),
        vision_num_attention_heads=vision.size("num_heads"),
        vision_ffn_hidden_size=vision.size("intermediate_size"),
        vocab_size=text.size("vocab_size"),
        max_positions=text.size("max_position_embeddings"),
    )


def _read_llava(config: Mapping[str, Any], where: str) -> ModelFacts:
    text = _section(config, "text_config", _LLAMA, where)
    has_tower = config.get("vision_config") is not None
    vision = _section(config, "vision_config", _CLIP_VISION if has_tower else _LLAVA_VISION, where)
    _require_type(text, "llama")
    _require_type(vision, "clip_vision_model")
    num_heads = text.size("num_attention_heads")
    return ModelFacts(
        num_layers=text.size("num_hidden_layers"),
        num_attention_heads=num_heads,
        num_query_groups=text.size_or("num_key_value_heads", num_heads),
        head_dim=text.size_or("head_dim", text.size("hidden_size") // num_heads),
        ffn_hidden_size=text.size("intermediate_size"),
        vision_num_layers=vision.size("num_hidden_layers"),
        vision_num_attention_heads=vision.size("num_attention_heads"),
        vision_ffn_hidden_size=vision.size("intermediate_size"),
        vocab_size=text.size("vocab_size"),
        max_positions=text.size("max_position_embeddings"),
    )


READERS: dict[str, Callable[[Mapping[str, Any], str], ModelFacts]] = {
    "qwen3_vl": _read_qwen3_vl,
    "llava": _read_llava,
}

"""A vision tower and a language model, each of a Hugging Face directory of its own, become one model's directory.

With the `mlp` connector that is a LLaVA directory; with others one of `model_type` megavlm. Tensors are copied as they
are; the connector's are new, and so are the rows of new tokens, which begin as the mean of the old ones
(Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021).
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megavlm.checkpoint.hf_io import DTYPE_NAMES, read_json, weight_files, write_tensors
from megavlm.checkpoint.safetensors_reader import SafetensorsFile
from megavlm.errors import use_error
from megavlm.models.architecture import Architecture, ConnectorArchitecture
from megavlm.models.clip import TOWER
from megavlm.models.families.composed import MODEL_TYPE, connector_shapes
from megavlm.models.families.composed import read_config as read_composed
from megavlm.models.registry import family_of

# LLaVA's names of what `connector_shapes` calls otherwise.
_LLAVA_NAMES = {"linear_fc1": "linear_1", "linear_fc2": "linear_2"}
VOCABULARY_MULTIPLE = 64
"""A vocabulary that grows grows to a multiple of this, so that tensor parallelism divides it."""
INITIAL_STD = 0.02


@dataclass(frozen=True)
class Composition:
    """What is put together.

    Attributes:
        vision_dir: CLIP or SigLIP model, whole or its vision part.
        language_dir: text-only language model.
        connector: `connector_config` of the new model, with its `type`.
        image_token: the placeholder of an image.
        feature_layer: which hidden state of the tower is the feature, counted from the end; None: the family's own.
        seed: of the connector's first weights.
        dtype: of all weights; None: the language model's.
    """

    vision_dir: Path
    language_dir: Path
    connector: Mapping[str, Any]
    image_token: str = "<image>"
    feature_layer: int | None = None
    seed: int = 0
    dtype: str | None = None


def composed_config(parts: Composition, image_token_id: int, num_tokens: int) -> dict[str, Any]:
    """config.json of the new model.

    Args:
        parts: what is put together.
        image_token_id: id of the placeholder.
        num_tokens: ids that the tokenizer uses; a smaller vocabulary grows.

    Raises:
        UseError: a part is not what it should be, or they do not go together.
    """
    vision, text = read_json(parts.vision_dir / "config.json"), read_json(parts.language_dir / "config.json")
    if "vision_config" in vision:
        vision = {"model_type": f"{vision.get('model_type', 'clip')}_vision_model", **vision["vision_config"]}
    if "vision_config" in text:
        raise use_error(
            str(parts.language_dir), f"a {text.get('model_type')} model", "a text-only language model", "use another"
        )
    dtype = parts.dtype or text.get("dtype") or text.get("torch_dtype") or "float32"
    text = {**text, "vocab_size": vocabulary_for(num_tokens, text["vocab_size"])}
    config: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        "dtype": dtype,
        "vision_feature_layer": -2 if parts.feature_layer is None else parts.feature_layer,
    }
    if parts.connector["type"] == "mlp":
        config |= {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": image_token_id,
            "vision_feature_select_strategy": _strategy(vision),
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
        }
        architecture = family_of("llava").read_config(config)
        config["image_seq_length"] = architecture.vision.num_positions
        return config
    config |= {
        "model_type": MODEL_TYPE,
        "image_token_id": image_token_id,
        "connector_config": dict(parts.connector),
    }
    read_composed(config)
    return config


def vocabulary_for(num_tokens: int, vocab_size: int) -> int:
    """Rows of an embedding for so many tokens: as many as there are, or if these are too few a handy number."""
    return vocab_size if vocab_size >= num_tokens else -(-num_tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _strategy(vision: Mapping[str, Any]) -> str:
    """SigLIP has no class token that would have to be dropped."""
    return "full" if vision.get("model_type") == "siglip_vision_model" else "default"


def write_composed(parts: Composition, config: Mapping[str, Any], num_tokens_before: int, out_dir: Path) -> None:
    """Write config.json, weights, generation and image processor files.

    Args:
        parts: what is put together.
        config: from `composed_config`.
        num_tokens_before: ids that the language model's tokenizer used; rows from there on are new.
        out_dir: an existing directory, with the tokenizer.

    Raises:
        UseError: a part's tensors are not those that its config speaks of.
    """
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _copy_processors(parts, config, out_dir)
    family = family_of(config["model_type"])
    architecture = family.read_config(dict(config))
    wanted = {name for entry in family.weight_map(architecture) for name in entry.names}
    dtype = DTYPE_NAMES[config["dtype"]]
    tensors = _tensors(parts, config, architecture, num_tokens_before)
    write_tensors(((name, tensor.to(dtype)) for name, tensor in _complete(tensors, wanted, parts)), out_dir)


def _complete(
    tensors: Iterator[tuple[str, torch.Tensor]], wanted: set[str], parts: Composition
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that the new model has, all of them."""
    missing = set(wanted)
    for name, tensor in tensors:
        if name in wanted:
            missing.remove(name)
            yield name, tensor
    if missing:
        named = ", ".join(sorted(missing)[:3])
        raise use_error(
            f"{parts.vision_dir}, {parts.language_dir}",
            f"no tensors for {named}" + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            "the weights that the two config.json speak of",
            "give complete directories",
        )


def _tensors(
    parts: Composition, config: Mapping[str, Any], architecture: Architecture, num_tokens_before: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under its new name."""
    for name, tensor in _stored(parts.vision_dir):
        inner = name.removeprefix("vision_model.")
        if inner != name or not name.startswith(("text_model.", "logit_scale", "text_projection", "visual_projection")):
            yield TOWER + inner, tensor
    vocab_size = architecture.language.vocab_size
    for name, tensor in _stored(parts.language_dir):
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = with_new_rows(tensor, num_tokens_before, vocab_size)
        yield f"language_model.{name}", tensor
    yield from _new_connector(architecture, config, parts)


def _stored(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in weight_files(folder):
        opened = SafetensorsFile(file)
        for name in opened.names:
            yield name, opened.read(name)


def with_new_rows(old: torch.Tensor, num_used: int, vocab_size: int) -> torch.Tensor:
    """An embedding of `vocab_size` rows, those from `num_used` on the mean of those before."""
    num_used = min(num_used, len(old))
    mean = old[:num_used].double().mean(dim=0).to(old.dtype)
    return torch.cat((old[:num_used], mean.expand(vocab_size - num_used, -1)))


def _new_connector(
    architecture: Architecture, config: Mapping[str, Any], parts: Composition
) -> Iterator[tuple[str, torch.Tensor]]:
    """First weights: matrices and queries normal, norms 1, biases 0; those of a name depend on name and seed alone."""
    is_llava = config["model_type"] == "llava"
    connector = ConnectorArchitecture("mlp") if is_llava else architecture.connector
    shapes = connector_shapes(dataclasses.replace(architecture, connector=connector))
    for name, shape in shapes.items():
        if len(shape) == 1:
            is_norm = "norm" in name and name.endswith("weight")
            tensor = torch.ones(shape) if is_norm else torch.zeros(shape)
        else:
            digest = hashlib.sha256(f"{parts.seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            tensor = torch.empty(shape).normal_(0.0, INITIAL_STD, generator=generator)
        part, _, kind = name.rpartition(".")
        yield f"multi_modal_projector.{_LLAVA_NAMES[part]}.{kind}" if is_llava else f"connector.{name}", tensor


def _copy_processors(parts: Composition, config: Mapping[str, Any], out_dir: Path) -> None:
    """The tower's image processor and the language model's generation defaults."""
    processor = parts.vision_dir / "preprocessor_config.json"
    if not processor.is_file():
        raise use_error(
            str(parts.vision_dir), "no preprocessor_config.json", "the tower's image processor", "copy it there"
        )
    shutil.copyfile(processor, out_dir / processor.name)
    if (parts.language_dir / "generation_config.json").is_file():
        shutil.copyfile(parts.language_dir / "generation_config.json", out_dir / "generation_config.json")
    if config["model_type"] != "llava":
        return
    processor_config = {
        "processor_class": "LlavaProcessor",
        "image_processor": read_json(processor),
        "patch_size": config["vision_config"]["patch_size"],
        # CLIP's class token, which "default" drops
        "num_additional_image_tokens": 1 if config["vision_feature_select_strategy"] == "default" else 0,
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
        "image_token": parts.image_token,
    }
    text = json.dumps(processor_config, indent=2) + "\n"
    (out_dir / "processor_config.json").write_text(text, encoding="utf-8")

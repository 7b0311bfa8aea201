"""LLaVA-1.5: CLIP (class token dropped) or SigLIP tower, two-layer MLP, any Llama, Mistral or Qwen decoder.

Source: Liu et al., arXiv 2310.03744; layouts checked against transformers' llava.
"""

from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megavlm.errors import use_error
from megavlm.models.activations import ACTIVATIONS
from megavlm.models.architecture import Architecture
from megavlm.models.clip import TOWER, build_tower, input_spec, read_tower, tower_entries
from megavlm.models.decoders import decoder_entries, read_decoder
from megavlm.models.family import ModelFamily
from megavlm.models.projector import Connectors, TwoLayerMLP
from megavlm.models.weight_map import Entry, direct


def read_config(config: dict[str, Any]) -> Architecture:
    """Read config.json of a `llava` model."""
    tower = read_tower(config["vision_config"], config.get("vision_feature_layer", -2))
    expected: dict[str, Any] = {
        "vision_feature_select_strategy": "default" if tower.class_token else "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
    }
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise use_error(f"config.json {key}", config[key], str(value), "only LLaVA-1.5's own choice is supported")
    language = read_decoder(config["text_config"], config.get("tie_word_embeddings", False))
    image_token_id = config.get("image_token_index", config.get("image_token_id", 32000))
    inputs = input_spec(config["vision_config"], image_token_id, language.vocab_size)
    return Architecture("llava", tower, language, inputs)


def build_projector(
    config: TransformerConfig, architecture: Architecture, provider: LocalSpecProvider, groups: ProcessGroupCollection
) -> nn.Module:
    """Linear, GELU, Linear."""
    size = architecture.language.hidden_size
    sizes = (architecture.vision.hidden_size, size, size)
    return Connectors(config, TwoLayerMLP(config, provider, groups, sizes, ACTIVATIONS["gelu"]), [])


def weight_map(architecture: Architecture) -> list[Entry]:
    """Native names to the names of a LLaVA-1.5 checkpoint on the hub."""
    entries = decoder_entries(architecture.language, "language_model.model.", "language_model.lm_head.weight")
    entries += tower_entries(architecture)
    for kind in ("weight", "bias"):
        for ours, theirs in (("linear_fc1", "linear_1"), ("linear_fc2", "linear_2")):
            entries.append(direct(f"projector.main.{ours}.{kind}", f"multi_modal_projector.{theirs}.{kind}"))
    return entries


def public_name(name: str) -> str:
    """transformers 5 may write `model.vision_tower.encoder...`; the hub's name is `vision_tower.vision_model.`..."""
    name = name.removeprefix("model.")
    if name.startswith("language_model.") and not name.startswith(("language_model.model.", "language_model.lm_head")):
        name = "language_model.model." + name.removeprefix("language_model.")
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    if name.startswith("vision_tower.") and not name.startswith(TOWER):
        return TOWER + name.removeprefix("vision_tower.")
    return name


def memory_name(name: str) -> str:
    """The name in transformers 5's memory, `model.language_model.layers...`, `model.vision_tower.encoder...`."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    name = name.replace("language_model.model.", "language_model.", 1).replace(TOWER, "vision_tower.", 1)
    return f"model.{name}"


FAMILY = ModelFamily(
    model_type="llava",
    read_config=read_config,
    build_tower=build_tower,
    build_projector=build_projector,
    weight_map=weight_map,
    public_name=public_name,
    memory_name=memory_name,
)

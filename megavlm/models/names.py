"""Parameter names that depend neither on the layout nor on the backend: layers and experts have their global number."""

import re
from collections.abc import Iterator
from types import MappingProxyType

import torch

from megavlm.config.tuning import COMPONENTS
from megavlm.models.chunk import LanguageChunk
from megavlm.models.encoder import VisionEncoder

Part = VisionEncoder | LanguageChunk
"""A part of the model that a rank holds."""

# Where Transformer Engine keeps a layer's norms: in the linears behind them. To the names of norms that stand alone.
FUSED_NORMS = MappingProxyType(
    {"self_attention.linear_qkv.layer_norm_": "input_layernorm.", "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."}
)

_LAYER = re.compile(r"^(language\.decoder|vision\.block)\.layers\.(\d+)\.")
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.(\d+)\.")
_GROUPED = re.compile(r"^mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$")
_STACKED = re.compile(r"\.experts\.local_experts\.(\d+)\.")


def global_name(part: Part, name: str) -> str:
    """The name of a parameter of this part in the whole model."""
    match = _LAYER.match(name)
    if not match:
        return name
    block = part.vision.block if isinstance(part, VisionEncoder) else part.language.decoder
    layer, rest = block.layers[int(match.group(2))], name[match.end() :]
    expert = _EXPERT.match(rest)
    grouped = _GROUPED.match(rest)
    if expert:
        number = layer.mlp.local_expert_indices[int(expert.group(1))]
        rest = f"mlp.experts.local_experts.{number}.{rest[expert.end() :]}"
    elif grouped:
        linear, kind, local_number = grouped.groups()
        number = layer.mlp.local_expert_indices[int(local_number)]
        rest = f"mlp.experts.local_experts.{number}.{linear}.{kind}"
    for fused, alone in FUSED_NORMS.items():
        if rest.startswith(fused):
            rest = alone + rest.removeprefix(fused)
    return f"{match.group(1)}.layers.{layer.layer_number - 1}.{rest}"


def stacked_name(name: str) -> tuple[str, int | None]:
    """Where a parameter lies in checkpoints and weight maps: those of a layer's experts are one tensor there.

    Returns:
        Name of the tensor, and the expert's place in it; None for a parameter that is a tensor of its own.
    """
    match = _STACKED.search(name)
    if not match:
        return name, None
    return f"{name[: match.start()]}.experts.experts.{name[match.end() :]}", int(match.group(1))


def named_parameters(model: Part) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of this part by their global names.

    A tied output layer is named as such, although it is (a copy of) the embedding.
    """
    for name, parameter in model.named_parameters():
        yield global_name(model, name), parameter


def component_of(name: str) -> str:
    """Component (`vision`, `projector` or `language`) of a parameter, by its name with or without wrappers."""
    for part in name.split("."):
        if part in COMPONENTS:
            return part
    raise AssertionError(f"{name} belongs to no component")


def layer_of(name: str) -> int | None:
    """Number of the layer that a parameter or module of this (global) name is in; None: in none."""
    match = _LAYER.match(name)
    return int(match.group(2)) if match else None


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's, beside the model's own."""
    return ".adapter." in name

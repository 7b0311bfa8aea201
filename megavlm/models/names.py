"""Parameter names that do not depend on the layout: layers carry their global number."""

import re
from collections.abc import Iterator

import torch

from megavlm.models.vlm import VisionLanguageModel

COMPONENTS = ("vision", "projector", "language")

_LAYER = re.compile(r"^language\.decoder\.layers\.(\d+)\.")


def global_name(model: VisionLanguageModel, name: str) -> str:
    """The name of a parameter of this chunk in the whole model."""
    match = _LAYER.match(name)
    if not match:
        return name
    number = model.language.decoder.layers[int(match.group(1))].layer_number - 1
    return f"language.decoder.layers.{number}.{name[match.end() :]}"


def named_parameters(model: VisionLanguageModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of this chunk by their global names.

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

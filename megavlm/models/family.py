"""What a model family is: a record of plain functions. A new one is a file in `families/` and a registry line."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megavlm.models.architecture import Architecture
from megavlm.models.weight_map import Entry


@dataclass(frozen=True)
class ModelFamily:
    """How one Hugging Face model type is read, built and mapped.

    Attributes:
        model_type: `model_type` of its config.json.
        read_config: config.json's content to our architecture.
        build_tower: (transformer config, architecture, provider, groups) to a module, with its layers in `block`, that
            takes a list of the patches [P, C], and grids [N, 3], and returns hidden states [P or V, D]: the last, then
            one per DeepStack layer. Where `groups.pp` has several ranks it is one of as many stages: the first takes
            the patches, every other one what the one before returned.
        build_projector: the same arguments to a module that takes those hidden states, and grids, and returns features
            [V, K, H].
        weight_map: architecture to one entry per native parameter.
        public_name: spelling variants of a checkpoint's tensor names to the one that the map uses and an export writes.
        memory_name: a name of the map to the one that transformers has for it in memory, by which adapters are named.
    """

    model_type: str
    read_config: Callable[[dict[str, Any]], Architecture]
    build_tower: Callable[[TransformerConfig, Architecture, LocalSpecProvider, ProcessGroupCollection], nn.Module]
    build_projector: Callable[[TransformerConfig, Architecture, LocalSpecProvider, ProcessGroupCollection], nn.Module]
    weight_map: Callable[[Architecture], list[Entry]]
    public_name: Callable[[str], str]
    memory_name: Callable[[str], str]

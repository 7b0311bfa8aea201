"""The output layer of a model whose loss computes the logits by itself, piece by piece."""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


def leave_out_product(language: GPTModel, groups: ProcessGroupCollection) -> None:
    """Have the output layer hand out its input, as the product of matrices would take it: whole rows on every rank.

    Gradients come back as from the layer: summed over tensor-parallel ranks, which have a part of the vocabulary each.
    The layer is still called, so that its weight is there when gathering of parameters is overlapped.
    """
    gathers = language.config.sequence_parallel

    def forward(
        input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, None]:
        if gathers:
            return gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=groups.tp), None
        return copy_to_tensor_model_parallel_region(input_, group=groups.tp), None

    vars(language.output_layer)["forward"] = forward


def output_weight(language: GPTModel) -> torch.Tensor:
    """What the hidden states are multiplied by: [vocabulary of this rank, hidden size]."""
    shared = language.share_embeddings_and_output_weights
    weight: torch.Tensor = language.shared_embedding_or_output_weight() if shared else language.output_layer.weight
    return weight

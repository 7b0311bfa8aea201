"""Weights of a Hugging Face directory into the parameters that a rank holds, in any layout."""

from collections.abc import Iterable

import torch

from megavlm.checkpoint.hf_io import HFDirectory
from megavlm.errors import use_error
from megavlm.models.encoder import VisionEncoder
from megavlm.models.names import Part, named_parameters, stacked_name
from megavlm.models.weight_map import Entry


def load_weights(directory: HFDirectory, models: Iterable[Part]) -> None:
    """Fill this rank's parameters from a directory, each rank reading only what it holds; not a new head.

    Raises:
        UseError: names or shapes do not fit the config.
    """
    directory.check()
    by_native = {entry.native: entry for entry in directory.entries}
    new = {*directory.new_names, *directory.new_mask_names}
    with torch.no_grad():
        for model in models:
            for name, parameter in named_parameters(model):
                native, expert = stacked_name(tied_name(name, model))
                entry = by_native[native]
                if entry.names[0] in new:
                    continue  # the caller fills it
                part = shard_of(directory.read_native(entry, expert), parameter, entry, model)
                if part.shape != parameter.shape:
                    raise use_error(
                        f"{directory.path} {entry.names[0]}",
                        f"a part of shape {tuple(part.shape)}",
                        f"{tuple(parameter.shape)} as config.json says",
                        "config and weights must belong together",
                    )
                parameter.copy_(part)


def tied_name(name: str, model: Part) -> str:
    """The name that a parameter's tensor has in weight maps: of a tied output layer, the embedding's."""
    tied = not isinstance(model, VisionEncoder) and model.share_embeddings_and_output_weights
    if name == "language.output_layer.weight" and tied:
        return "language.embedding.word_embeddings.weight"
    return name


def shard_of(whole: torch.Tensor, parameter: torch.nn.Parameter, entry: Entry, model: Part) -> torch.Tensor:
    """Cut this tensor-parallel rank's part. Megatron-Core marks its sharded parameters with these attributes."""
    marks = vars(parameter)
    if not marks.get("tensor_model_parallel", False):
        return whole
    group = model.groups.vision.tp if isinstance(model, VisionEncoder) else model.groups.tensor
    if entry.stacked:
        group = model.groups.language.expt_tp
    dimension, size, rank = marks["partition_dim"], group.size(), group.rank()
    if entry.halves:
        return torch.cat([half.chunk(size, dimension)[rank] for half in whole.chunk(2, dimension)], dimension)
    return whole.chunk(size, dimension)[rank]

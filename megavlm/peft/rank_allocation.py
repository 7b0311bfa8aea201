"""Ranks for layers within a budget of parameters, more where the loss depends more on the weights.

Source of the measure: the diagonal of the empirical Fisher information (Kirkpatrick et al., arXiv 1612.00796), summed
over what a layer's adapters begin with. Source of the apportionment: D'Hondt's method, as seats are given out.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from megavlm.config.peft import PeftConfig
from megavlm.errors import use_error


@dataclass(frozen=True)
class LayerInformation:
    """What is known of a layer's adapters.

    Attributes:
        information: mean squared gradients, summed over the layer's parameters.
        num_parameters: that one rank costs.
    """

    information: float
    num_parameters: int


Layer = tuple[str, int | None]
"""Component, and number of the layer; None: what is in no layer."""


def allocate_ranks(
    layers: Mapping[Layer, LayerInformation], budget: int, max_rank: int, min_rank: int = 1
) -> dict[Layer, int]:
    """Give out ranks one after the other, each to the layer with most information for a parameter of its next rank.

    The k-th rank of a layer counts 1 / k of its information, so that in the end ranks are about proportional to
    information per parameter.

    Args:
        layers: what is known of each.
        budget: parameters at most.
        max_rank: of a layer.
        min_rank: of a layer.

    Raises:
        UseError: the budget is too small for `min_rank` everywhere.
    """
    ranks = dict.fromkeys(layers, min_rank)
    spent = sum(min_rank * one.num_parameters for one in layers.values())
    if spent > budget:
        raise use_error(
            "--budget", f"{budget} parameters", f"at least {spent}, rank {min_rank} for every layer", "raise it"
        )

    def worth(layer: Layer) -> tuple[float, int]:
        one = layers[layer]
        return -one.information / (one.num_parameters * (ranks[layer] + 1)), order[layer]

    order = {layer: number for number, layer in enumerate(layers)}
    queue = [(worth(layer), layer) for layer in layers]
    heapq.heapify(queue)
    while queue:
        _, layer = heapq.heappop(queue)
        cost = layers[layer].num_parameters
        if spent + cost > budget or ranks[layer] >= max_rank:
            continue  # others may still fit
        ranks[layer] += 1
        spent += cost
        heapq.heappush(queue, (worth(layer), layer))
    return ranks


def as_components(ranks: Mapping[Layer, int], frozen: Mapping[str, bool], peft: PeftConfig) -> str:
    """Ranks in the notation of `peft.components`, neighbouring layers of one rank together.

    Every layer keeps the scaling that the recipe's rank and alpha give.

    Args:
        ranks: of layers.
        frozen: by component, whether nothing of it learns.
        peft: says rank and alpha.
    """
    entries = [f"{component}: frozen" for component, is_frozen in frozen.items() if is_frozen]
    runs: list[tuple[str, int | None, int | None, int]] = []
    for (component, layer), rank in sorted(ranks.items(), key=lambda one: (one[0][0], one[0][1] or 0)):
        if layer is None:
            runs.append((component, None, None, rank))
            continue
        last = runs[-1] if runs else None
        if last is not None and last[0] == component and last[2] == layer and last[3] == rank:
            runs[-1] = (component, last[1], layer + 1, rank)
        else:
            runs.append((component, layer, layer + 1, rank))
    for component, start, end, rank in runs:
        where = component if start is None else f"{component}[{start}:{end}]"
        ratio = (rank / peft.lora_rank) ** (0.5 if peft.use_rslora else 1.0)
        entries.append(f"{where}: lora r={rank} alpha={peft.lora_alpha * ratio:.6g}")
    return ", ".join(entries)

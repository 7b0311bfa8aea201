"""What every rank has to load and encode, step by step: from the plan of samples to orders for the loader.

Every rank computes this alike, from the plan and the image sizes of all rows.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.config.inputs import Grid
from megavlm.config.schema import TokenWeights
from megavlm.data.dataset import Dataset
from megavlm.data.sample import MicrobatchOrder
from megavlm.data.token_weights import DEFAULT_WEIGHTS
from megavlm.models.architecture import Architecture
from megavlm.parallel.topology import Replica, Topology
from megavlm.planner.flops import head_flops, image_flops, layer_flops
from megavlm.train.shares import StepShares, share_step

Row = tuple[tuple[int, ...], bool]
"""A microbatch of one data rank: sample indices, and whether it only fills up a round."""


@dataclass(frozen=True)
class StepInputs:
    """One run through a schedule, seen from one rank.

    Attributes:
        orders: what the rank wants from the loader, per microbatch.
        shares: who encodes what.
        lengths: per microbatch of this rank's data rank, the lengths of its sequences in tokens.
        grids: per microbatch of this rank's data rank, its images.
    """

    orders: tuple[MicrobatchOrder, ...]
    shares: StepShares
    lengths: tuple[tuple[int, ...], ...]
    grids: tuple[tuple[Grid, ...], ...]


@dataclass(frozen=True)
class CostModel:
    """What encoding an image and decoding a row cost, in exact FLOPs of the matrix products.

    Attributes:
        architecture: of the model.
        trains_encoder: a frozen encoder has no backward pass.
        layers: decoder layers of every stage of the language model, by [stage][chunk].
    """

    architecture: Architecture
    trains_encoder: bool
    layers: tuple[tuple[int, ...], ...]

    def encode(self, grid: Grid) -> float:
        """Forward pass of an image through tower and connectors."""
        return _image_flops(self.architecture, grid)

    def decode(self, stage: int, chunk: int, lengths: Sequence[int], grids: Sequence[Grid]) -> float:
        """Forward pass of a packed row through a chunk of a stage, the output layer with the last.

        Args:
            stage: pipeline stage of the language model.
            chunk: of the stage.
            lengths: of the row's samples, in tokens.
            grids: the row's images, which some layers may read.
        """
        architecture = self.architecture
        visual = sum(map(architecture.inputs.num_image_tokens, grids)) if architecture.gate_interval else 0
        cost = self.layers[stage][chunk] * layer_flops(architecture, lengths, visual)
        is_last = stage == len(self.layers) - 1 and chunk == len(self.layers[0]) - 1
        return cost + (head_flops(architecture.language, sum(lengths)) if is_last else 0)


@functools.lru_cache(maxsize=65536)
def _image_flops(architecture: Architecture, grid: Grid) -> float:
    return float(image_flops(architecture, grid))


def step_inputs(
    topology: Topology,
    rank: int,
    dataset: Dataset,
    rows_D: Sequence[Sequence[Row]],
    costs: CostModel,
    token_weights: TokenWeights = DEFAULT_WEIGHTS,
    step: int = -1,
) -> StepInputs:
    """Share out the images of some rows, and say what this rank loads.

    Args:
        topology: of the run.
        rank: this one.
        dataset: what the sample indices mean.
        rows_D: by data rank, its microbatches; as many for each.
        costs: of encoding and decoding.
        token_weights: of the kinds of tokens in this step.
        step: of training, from 0; negative: this is no training, and images are not augmented.
    """
    home = topology.loading_data_rank(rank)
    takes_all = topology.placement in ("spread", "own_ranks")
    data_ranks = range(len(rows_D)) if takes_all else [home]
    num_microbatches = len(rows_D[home])
    images_MD: list[dict[int, list[tuple[int, int]]]] = [
        {
            data: [(index, number) for index in rows_D[data][m][0] for number in range(len(dataset.grids_each[index]))]
            for data in data_ranks
        }
        for m in range(num_microbatches)
    ]
    grids_MD = [
        {data: [dataset.grids_each[index][number] for index, number in images] for data, images in images_D.items()}
        for images_D in images_MD
    ]
    lengths = tuple(
        tuple(length for index in row[0] for length in dataset.sequence_lengths(index)) for row in rows_D[home]
    )
    grids = tuple(tuple(grids_D[home]) for grids_D in grids_MD)

    def load_of(replica: Replica, microbatch: int) -> float:
        stage = replica.position - topology.first_position
        chunks = range(len(costs.layers[stage]))
        forward = sum(costs.decode(stage, chunk, lengths[microbatch], grids[microbatch]) for chunk in chunks)
        return 3 * forward / (topology.tensor * topology.context)

    factor = (3 if costs.trains_encoder else 1) / topology.vision_tensor
    shares = share_step(
        topology,
        grids_MD,
        lambda grid: factor * costs.encode(grid),
        load_of if topology.placement == "bubble" else None,
    )
    part = topology.replica_of(rank)
    orders = []
    for m, (indices, filler) in enumerate(rows_D[home]):
        wanted: list[tuple[int, int]] = []
        if part is not None and part[1] == 0:  # only an encoder's first stage takes pixels
            keys = shares.microbatches[m].images_of(part[0].number)
            wanted = [images_MD[m][key.data][key.number] for key in keys]
        orders.append(MicrobatchOrder(indices, tuple(wanted), filler, token_weights, step))
    return StepInputs(tuple(orders), shares, lengths, grids)

"""Which rank encodes which image of a microbatch, where all ranks encode: equal finishing times, not equal counts.

Shape suffixes: R pipeline ranks, C language-model chunks of a rank, M microbatches.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megavlm.pipeline.actions import Schedule
from megavlm.pipeline.bubble import QUICK_RULES, Rule, bubble
from megavlm.pipeline.costs import StageCosts
from megavlm.pipeline.simulate import simulate

Owners = list[list[int]]
"""Per microbatch the rank of each image."""

TILTS = (0.0, 0.025, 0.05)
"""What `share_and_place` tries; see `share_images`."""


def share_images(
    image_costs: Sequence[Sequence[float]],
    rank_loads: Sequence[Sequence[float]],
    *,
    tilt: float = 0.0,
    num_early: int = 0,
) -> Owners:
    """Give every image to a rank so that encoder and language model together load the ranks evenly.

    Longest image first, to the rank that has least so far. What a microbatch leaves uneven is made up for in the next
    one. A rank with fewer layers of the language model thus encodes more.

    In a pipeline the first ranks wait in the beginning, for the first gradient, and the last ones in the end. With a
    tilt the first ranks take more of the early microbatches' images, and less of the later ones'.

    Args:
        image_costs: per microbatch the cost of each image, forward and backward together.
        rank_loads: per microbatch the cost of each rank's language-model work on it, in the same unit.
        tilt: part of all the encoder's work that the first rank takes early on, above an even share, and the last rank
            leaves; ranks between them in proportion.
        num_early: microbatches that are early.

    Returns:
        Per microbatch the rank of each image.
    """
    num_microbatches = len(image_costs)
    assert num_microbatches == len(rank_loads), (num_microbatches, len(rank_loads))
    num_ranks = len(rank_loads[0]) if num_microbatches else 0
    num_early = min(num_early, num_microbatches)
    ahead_R = np.zeros(num_ranks)
    if 0 < num_early < num_microbatches:
        ahead_R = tilt * sum(map(sum, image_costs)) * np.linspace(1, -1, num_ranks)
    owners: Owners = []
    total_R = np.zeros(num_ranks)
    for microbatch, (costs, loads) in enumerate(zip(image_costs, rank_loads, strict=True)):
        # What a rank is to be ahead by counts as if it had not been done yet, and later as done.
        is_early = microbatch < num_early
        total_R += loads
        total_R -= ahead_R / num_early if is_early else -ahead_R / (num_microbatches - num_early)
        microbatch_owners = [0] * len(costs)
        for image in sorted(range(len(costs)), key=lambda image: (-costs[image], image)):
            rank = int(total_R.argmin())
            microbatch_owners[image] = rank
            total_R[rank] += costs[image]
        owners.append(microbatch_owners)
    return owners


def shares_RM(image_values: Sequence[Sequence[float]], owners: Owners, num_ranks: int) -> np.ndarray:
    """What each rank has of each microbatch: float64 [R, M], the sum over its images.

    Args:
        image_values: per microbatch of each image: a cost, or bytes.
        owners: from `share_images`.
        num_ranks: R.
    """
    sums_RM = np.zeros((num_ranks, len(owners)))
    for microbatch, (values, ranks) in enumerate(zip(image_values, owners, strict=True)):
        for value, rank in zip(values, ranks, strict=True):
            sums_RM[rank, microbatch] += value
    return sums_RM


@dataclass(frozen=True)
class SharedBubble:
    """A bubble schedule and who encodes what in it.

    Attributes:
        owners: per microbatch the rank of each image.
        costs: what was asked with, the encoder's work filled in.
        schedule: made for these.
        makespan_s: as simulated.
    """

    owners: Owners
    costs: StageCosts
    schedule: Schedule
    makespan_s: float


def share_and_place(
    image_costs: Sequence[Sequence[float]],
    costs: StageCosts,
    *,
    max_live_encoder: int,
    backward_factor: float = 2.0,
    recompute: bool = False,
    extra_in_flight: int = 0,
    tilts: Sequence[float] = TILTS,
    rules: Sequence[Rule] = QUICK_RULES,
) -> SharedBubble:
    """Share the images of a step out and place the encoder into the bubbles, for the shortest step.

    Args:
        image_costs: per microbatch the cost of each image's forward.
        costs: of the language model and the messages; what it says of the encoder's times is not used.
        max_live_encoder: see `bubble`, for this and the others.
        backward_factor: cost of the encoder's backward over its forward; 0: a frozen encoder, without backward.
        recompute: encode again before each backward.
        extra_in_flight: more microbatches in flight.
        tilts: shares that are tried, see `share_images`.
        rules: orders that are tried for each of them.

    Raises:
        UseError: see `bubble`.
    """
    num_ranks, num_chunks, num_microbatches = costs.shape
    trained = backward_factor > 0
    factor = 1 + backward_factor + (1 if recompute else 0)
    work_MI = [[factor * cost for cost in images] for images in image_costs]
    loads_MR = (costs.forward_s_RCM + costs.backward_s_RCM).sum(axis=1).T.tolist()
    num_early = min(max_live_encoder, num_microbatches // 2)
    best: SharedBubble | None = None
    for tilt in tilts:
        owners = share_images(work_MI, loads_MR, tilt=tilt, num_early=num_early)
        if best is not None and owners == best.owners:
            continue
        forward_RM = shares_RM(image_costs, owners, num_ranks)
        filled = dataclasses.replace(
            costs, encode_forward_s_RM=forward_RM, encode_backward_s_RM=backward_factor * forward_RM
        )
        schedule = bubble(
            num_ranks,
            num_microbatches,
            filled,
            max_live_encoder=max_live_encoder,
            num_chunks=num_chunks,
            train_encoder=trained,
            recompute=recompute,
            extra_in_flight=extra_in_flight,
            rules=rules,
        )
        makespan_s = simulate(schedule, filled).makespan_s
        if best is None or makespan_s < best.makespan_s:
            best = SharedBubble(owners, filled, schedule, makespan_s)
    assert best is not None, "no tilts"
    return best

"""Schedules whose order depends on the layout alone: 1F1B, interleaved, and the encoder's simple places around them.

1F1B: a rank runs a few forwards ahead and then one forward and one backward in turn, so that stage i of p holds the
activations of min(m, p - i) microbatches. Interleaved (Narayanan et al., arXiv:2104.04473): each rank holds v chunks of
layers, microbatches go round in groups of p; the bubble is v times smaller. Both in Megatron-Core's order.
"""

import dataclasses
from collections.abc import Sequence

from megavlm.errors import use_error
from megavlm.pipeline.actions import Compute, EncoderPlace, Kind, Schedule, StageMap, assemble


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """The language model alone, one stage a rank."""
    return interleaved(num_ranks, 1, num_microbatches)


def interleaved(num_ranks: int, num_chunks: int, num_microbatches: int) -> Schedule:
    """The language model alone, several chunks a rank.

    Raises:
        UseError: more than one chunk with a number of microbatches that is not a multiple of the ranks.
    """
    orders = language_orders(num_ranks, num_chunks, num_microbatches)
    return assemble("text", language_stages(num_ranks, num_chunks, num_microbatches), orders)


def first_stage(num_ranks: int, num_microbatches: int, *, num_chunks: int = 1, train_encoder: bool = True) -> Schedule:
    """The encoder on rank 0, which also holds the first layers of the language model.

    Raises:
        UseError: see `interleaved`.
    """
    encoder = EncoderPlace((0,), is_trained=train_encoder)
    stage_map = language_stages(num_ranks, num_chunks, num_microbatches, encoder)
    orders = language_orders(num_ranks, num_chunks, num_microbatches)
    orders[0] = _around_the_language_model(orders[0], train_encoder)
    return assemble("first_stage", stage_map, orders)


def vision_stages(
    num_vision_ranks: int, num_llm_ranks: int, num_microbatches: int, *, train_encoder: bool = True
) -> Schedule:
    """The encoder's layers on ranks of their own in front of the language model's: one pipeline of all of them.

    A frozen encoder runs forwards only, and runs ahead: the features of all microbatches may wait to be sent.

    Args:
        num_vision_ranks: k, at least 1: ranks 0..k-1.
        num_llm_ranks: ranks k.., one stage each.
        num_microbatches: m.
        train_encoder: False: no backward of the encoder.
    """
    assert num_vision_ranks >= 1 and num_llm_ranks >= 1 and num_microbatches >= 1
    num_ranks = num_vision_ranks + num_llm_ranks
    encoder = EncoderPlace(tuple(range(num_vision_ranks)), in_series=True, is_trained=train_encoder)
    stages = tuple((rank, 0) for rank in range(num_vision_ranks, num_ranks))
    stage_map = StageMap(num_ranks, num_microbatches, stages, encoder)
    kinds: dict[Kind, Kind] = {"F": "EF" if train_encoder else "E", "B": "EB"}
    orders = language_orders(num_ranks, 1, num_microbatches)
    for rank in encoder.ranks:
        orders[rank] = [
            Compute(kinds[compute.kind], compute.microbatch)
            for compute in orders[rank]
            if compute.kind == "F" or train_encoder
        ]
    return assemble("stage", stage_map, orders)


def spread(
    num_ranks: int, num_microbatches: int, *, num_chunks: int = 1, train_encoder: bool = True, recompute: bool = False
) -> Schedule:
    """Every rank encodes its share of all the images before the language model starts, gradients at the end.

    The encoder's activations of all microbatches are alive at once, unless they are computed again.

    Args:
        num_ranks: p.
        num_microbatches: m.
        num_chunks: language-model chunks a rank.
        train_encoder: False: no backward of the encoder, no activations.
        recompute: keep only the features and encode again before each backward: one microbatch is alive at a time.

    Raises:
        UseError: see `interleaved`.
    """
    encoder = EncoderPlace(tuple(range(num_ranks)), is_trained=train_encoder)
    stage_map = language_stages(num_ranks, num_chunks, num_microbatches, encoder)
    keeps = train_encoder and not recompute
    before = [Compute("EF" if keeps else "E", microbatch) for microbatch in range(num_microbatches)]
    kinds: tuple[Kind, ...] = (("EB",) if keeps else ("EF", "EB")) if train_encoder else ()
    after = [Compute(kind, microbatch) for microbatch in range(num_microbatches) for kind in kinds]
    orders = [[*before, *order, *after] for order in language_orders(num_ranks, num_chunks, num_microbatches)]
    return assemble("spread", stage_map, orders)


def forward_pass(stage_map: StageMap) -> Schedule:
    """Forwards only, for evaluation: microbatch after microbatch, encoded right before the language model takes it.

    Args:
        stage_map: who holds what; any number of microbatches, also with several chunks a rank.
    """
    encoder = stage_map.encoder and dataclasses.replace(stage_map.encoder, is_trained=False)
    stage_map = dataclasses.replace(stage_map, encoder=encoder, forward_only=True)
    table = _rounds(stage_map.num_ranks, stage_map.num_chunks, stage_map.num_microbatches)
    orders = []
    for rank in range(stage_map.num_ranks):
        encodes = encoder is not None and rank in encoder.ranks
        chunks = {chunk for owner, chunk in stage_map.stages if owner == rank}
        order: list[Compute] = []
        for microbatch, chunk in table:
            if encodes and chunk == 0:
                order.append(Compute("E", microbatch))
            if chunk in chunks:
                order.append(Compute("F", microbatch, chunk))
        orders.append(order)
    return assemble("forward", stage_map, orders)


def language_stages(
    num_ranks: int, num_chunks: int, num_microbatches: int, encoder: EncoderPlace | None = None
) -> StageMap:
    """Layers go over the ranks chunk by chunk: rank 0..p-1 of chunk 0, then of chunk 1."""
    stages = tuple((rank, chunk) for chunk in range(num_chunks) for rank in range(num_ranks))
    return StageMap(num_ranks, num_microbatches, stages, encoder)


def language_orders(
    num_ranks: int, num_chunks: int, num_microbatches: int, max_in_flight: int | None = None
) -> list[list[Compute]]:
    """Per rank the language model's work in order.

    Args:
        num_ranks: p.
        num_chunks: v.
        num_microbatches: m.
        max_in_flight: at most so many microbatches between the first stage's forward and backward; only with one
            chunk, where fewer than p of them make the pipeline wait.

    Raises:
        UseError: v > 1 and m is not a multiple of p.
    """
    assert num_ranks >= 1 and num_chunks >= 1 and num_microbatches >= 1
    assert max_in_flight is None or (num_chunks == 1 and max_in_flight >= 1)
    if num_chunks > 1 and num_microbatches % num_ranks:
        raise use_error(
            "train.global_batch_size",
            f"{num_microbatches} microbatches a data rank",
            f"a multiple of the {num_ranks} pipeline ranks, because each holds {num_chunks} model chunks",
            "change the global batch size, or set parallel.virtual_pipeline_model_parallel_size to 1",
        )
    table = _rounds(num_ranks, num_chunks, num_microbatches)
    orders = []
    for rank in range(num_ranks):
        if num_chunks == 1:
            num_ahead = num_ranks - rank - 1
            if max_in_flight is not None:
                num_ahead = min(num_ahead, max_in_flight - 1)
        else:
            num_ahead = (num_ranks - rank - 1) * 2 + (num_chunks - 1) * num_ranks
        orders.append(_alternating(table, num_chunks, min(num_ahead, len(table))))
    return orders


def _rounds(num_ranks: int, num_chunks: int, num_microbatches: int) -> list[tuple[int, int]]:
    """(microbatch, chunk) in the order of the forwards: p microbatches through chunk 0, then through chunk 1, ..."""
    return [
        (microbatch, chunk)
        for start in range(0, num_microbatches, num_ranks)
        for chunk in range(num_chunks)
        for microbatch in range(start, min(start + num_ranks, num_microbatches))
    ]


def _alternating(table: Sequence[tuple[int, int]], num_chunks: int, num_ahead: int) -> list[Compute]:
    """`num_ahead` forwards, then a forward and a backward in turn, then the backwards that are left."""
    forwards = [Compute("F", microbatch, chunk) for microbatch, chunk in table]
    backwards = [Compute("B", microbatch, num_chunks - 1 - chunk) for microbatch, chunk in table]
    order = forwards[:num_ahead]
    num_pairs = len(table) - num_ahead
    for forward, backward in zip(forwards[num_ahead:], backwards[:num_pairs], strict=True):
        order += [forward, backward]
    return order + backwards[num_pairs:]


def _around_the_language_model(order: Sequence[Compute], train_encoder: bool) -> list[Compute]:
    """Encode right before the first layers' forward; the encoder's backward right after theirs."""
    wrapped: list[Compute] = []
    for compute in order:
        is_first_chunk = compute.chunk == 0
        if compute.kind == "F" and is_first_chunk:
            wrapped.append(Compute("EF" if train_encoder else "E", compute.microbatch))
        wrapped.append(compute)
        if compute.kind == "B" and is_first_chunk and train_encoder:
            wrapped.append(Compute("EB", compute.microbatch))
    return wrapped

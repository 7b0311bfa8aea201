"""Which linears of a rank's parts are adapted, and which Hugging Face projections each of them is made of.

Megatron-Core has one linear where Hugging Face has several projections (query, key, value; gate, up). An adapter of
peft's belongs to a projection; so here each projection has one of its own inside the linear, and what they add is put
together in the linear's own order of rows.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3

from megavlm.config.tuning import Tuning, TuningPlan
from megavlm.models.linear import AdaptableLinear
from megavlm.models.names import Part, component_of, global_name, layer_of, stacked_name
from megavlm.models.weight_map import Entry

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Projection:
    """A Hugging Face projection inside a linear.

    Attributes:
        name: last part of its Hugging Face name, e.g. q_proj; no other of the linear has it.
        module: its whole name, without `.weight`.
        rows: int64, where its output rows that this rank holds stand in this rank's output of the linear; none at all
            is possible where tensor parallelism cuts a group of heads.
        start: number of the first of them in the projection; they follow each other there.
        num_rows: of the whole projection.
    """

    name: str
    module: str
    rows: torch.Tensor
    start: int
    num_rows: int


@dataclass(frozen=True)
class Target:
    """A linear that is adapted.

    Attributes:
        linear: the module.
        name: global name of the linear in the whole model.
        projections: of the linear, those that are adapted.
        tuning: how it learns.
        halves: whether its only projection has two halves (gate and up) that tensor parallelism cuts separately.
        is_expert: whether it is of an expert.
    """

    linear: AdaptableLinear
    name: str
    projections: tuple[Projection, ...]
    tuning: Tuning
    halves: bool
    is_expert: bool


def find_targets(
    parts: Iterable[Part], entries: Iterable[Entry], plan: TuningPlan, names: Sequence[str], methods: Sequence[str]
) -> Iterator[Target]:
    """The linears of these parts that a method adapts, in their order.

    Args:
        parts: of the model.
        entries: weight map of the whole model.
        plan: how each layer learns.
        names: ends of the Hugging Face names that are meant, or `all-linear`.
        methods: of the plan that this is about.
    """
    by_native = {entry.native: entry for entry in entries}
    for part in parts:
        for name, module in linears_of(part):
            tuning = plan.of(component_of(name), layer_of(name))
            if tuning.method not in methods:
                continue
            native, expert = stacked_name(f"{name}.weight")
            entry = by_native[native]
            meant = tuple(one for one in _projections(module, entry) if is_meant(one.module, names))
            if meant:
                halves = entry.halves and len(entry.names) == 1
                yield Target(module, name, meant, tuning, halves, expert is not None)


def linears_of(part: Part) -> Iterator[tuple[str, AdaptableLinear]]:
    """Linears that may be adapted, by their global names."""
    for name, module in list(part.named_modules()):
        if isinstance(module, AdaptableLinear):
            yield global_name(part, f"{name}.weight").removesuffix(".weight"), module


def is_meant(module: str, names: Sequence[str]) -> bool:
    """Whether a Hugging Face module's name is, or ends with, one of these (peft's rule)."""
    return any(name == ALL_LINEAR or module == name or module.endswith(f".{name}") for name in names)


def module_names(entry: Entry) -> list[str]:
    """Hugging Face modules that a native matrix is made of; a bare parameter (of experts) counts as one."""
    return [name.removesuffix(".weight") for name in entry.names]


def projection_names(entry: Entry) -> list[str]:
    """The same by the last part of their names."""
    return [module.rpartition(".")[2] for module in module_names(entry)]


def _projections(linear: AdaptableLinear, entry: Entry) -> list[Projection]:
    """All projections of a linear, with the rows that this rank has of each."""
    is_column = linear.is_column
    num_rows = linear.output_size_per_partition if is_column else linear.output_size
    modules, names = module_names(entry), projection_names(entry)
    assert len(set(names)) == len(names), f"{entry.native}: projections of one name"
    size, rank = (linear.tp_group.size(), linear.tp_group.rank()) if is_column else (1, 0)
    if len(modules) == 1:  # its rows are kept in the linear's own order
        return [Projection(names[0], modules[0], torch.arange(num_rows), rank * num_rows, size * num_rows)]
    place = torch.full((num_rows * size,), -1)
    place[held_rows(num_rows * size, size, rank, entry.halves)] = torch.arange(num_rows)
    numbers = torch.arange(num_rows * size)[:, None]
    found = []
    for name, module, rows in zip(names, modules, entry.to_hf(numbers), strict=True):
        local = place[rows[:, 0]]
        held = (local >= 0).nonzero().flatten()
        start = int(held[0]) if len(held) else 0
        assert torch.equal(held, start + torch.arange(len(held))), f"{module}: rows of a rank do not follow each other"
        found.append(Projection(name, module, local[held], start, len(rows)))
    return found


def held_rows(num_rows: int, size: int, rank: int, halves: bool) -> torch.Tensor:
    """Of a whole native matrix the rows that a tensor-parallel rank holds, in their order."""
    rows = torch.arange(num_rows)
    if not halves:
        return rows.chunk(size)[rank]
    return torch.cat([half.chunk(size)[rank] for half in rows.chunk(2)])


def seed_of(seed: int, name: str) -> int:
    """A seed for one tensor of the whole model, whatever rank makes it."""
    return int.from_bytes(blake3(f"{seed} {name}".encode()).digest(8), "little") >> 1


def places_of(projections: Sequence[Projection], num_outputs: int) -> torch.Tensor | None:
    """int64 [O]: for each output row of a linear its place among the projections' rows, one projection after the other.

    Rows of no projection have the place behind the last. None: all rows are there, and in order.
    """
    rows = torch.cat([one.rows for one in projections])
    places = torch.full((num_outputs,), len(rows))
    places[rows] = torch.arange(len(rows))
    return None if torch.equal(places, torch.arange(num_outputs)) else places

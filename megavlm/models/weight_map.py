"""Two-way weight maps between Hugging Face names and ours, as declarative entries.

An entry names one native parameter (whole, not sharded; layers by their global number) and the Hugging Face tensors
it is made of, with a function each way. Both functions only reorder or reshape, so that a round trip is bit-exact.

Megatron-Core's layouts: linear_qkv holds, per key/value group, its queries, then its key, then its value;
a gated linear_fc1 holds gate, then up.
"""

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from megavlm.errors import UseError

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """One native parameter and where it comes from.

    Attributes:
        native: our name.
        names: Hugging Face names, in the order the functions take them.
        to_native: those tensors to the whole native parameter.
        to_hf: back.
        halves: whether tensor parallelism cuts two halves of dimension 0 separately (gate and up).
        stacked: whether dimension 0 of all tensors, here and there, counts experts; the functions take any part of it,
            and `halves` means the next dimension.
        moves_rows: whether `to_native` only puts whole rows of dimension 0 into another order, and leaves each row's
            bytes as they are (`row_runs`).
    """

    native: str
    names: tuple[str, ...]
    to_native: Callable[[Tensors], torch.Tensor]
    to_hf: Callable[[torch.Tensor], list[torch.Tensor]]
    halves: bool = False
    stacked: bool = False
    moves_rows: bool = False


def direct(native: str, name: str) -> Entry:
    """The same tensor under another name."""
    return Entry(native, (name,), lambda tensors: tensors[0], lambda tensor: [tensor], moves_rows=True)


def flattened(native: str, name: str, shape: tuple[int, ...]) -> Entry:
    """A convolution whose kernel equals its stride, as a linear layer: [out, *shape] to [out, prod(shape)]."""

    def to_hf(tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.reshape(len(tensor), *shape)]

    return Entry(native, (name,), lambda tensors: tensors[0].flatten(1), to_hf, moves_rows=True)


def unsqueezed(native: str, name: str, num_dimensions: int) -> Entry:
    """A tensor that has leading dimensions of 1 on disk."""

    def to_hf(tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor[(None,) * num_dimensions]]

    return Entry(native, (name,), lambda tensors: tensors[0][(0,) * num_dimensions], to_hf)


def split_qkv(native: str, names: tuple[str, str, str], num_groups: int, head_dim: int) -> Entry:
    """Separate query, key and value projections (weights or biases)."""

    def to_native(tensors: Tensors) -> torch.Tensor:
        rest = tensors[0].shape[1:]
        per_group = [tensor.reshape(num_groups, -1, *rest) for tensor in tensors]
        return torch.cat(per_group, dim=1).reshape(-1, *rest)

    def to_hf(tensor: torch.Tensor) -> list[torch.Tensor]:
        rest = tensor.shape[1:]
        grouped = tensor.reshape(num_groups, -1, *rest)
        queries = grouped.shape[1] - 2 * head_dim
        return [part.reshape(-1, *rest) for part in grouped.split([queries, head_dim, head_dim], dim=1)]

    return Entry(native, names, to_native, to_hf, moves_rows=True)


def fused_qkv(native: str, name: str, num_heads: int) -> Entry:
    """A fused [query; key; value] projection without groups (weights or biases)."""

    def to_native(tensors: Tensors) -> torch.Tensor:
        rest = tensors[0].shape[1:]
        return tensors[0].reshape(3, num_heads, -1, *rest).transpose(0, 1).reshape(-1, *rest)

    def to_hf(tensor: torch.Tensor) -> list[torch.Tensor]:
        rest = tensor.shape[1:]
        return [tensor.reshape(num_heads, 3, -1, *rest).transpose(0, 1).reshape(-1, *rest)]

    return Entry(native, (name,), to_native, to_hf, moves_rows=True)


def gated(native: str, gate: str, up: str) -> Entry:
    """SwiGLU's gate and up projections as one (weights or biases)."""

    def to_hf(tensor: torch.Tensor) -> list[torch.Tensor]:
        return list(tensor.chunk(2))

    return Entry(native, (gate, up), lambda tensors: torch.cat(list(tensors)), to_hf, halves=True, moves_rows=True)


def transposed_experts(native: str, name: str, num_inputs: int, halves: bool) -> Entry:
    """Matrices of a layer's experts: [E, in, out] as on the hub, or [E, out, in] as in transformers, to [E, out, in].

    Args:
        native: our name.
        name: theirs.
        num_inputs: columns of a matrix, by which the layouts are told apart; it is not the number of its rows.
        halves: whether a matrix is gate and up.
    """

    def to_native(tensors: Tensors) -> torch.Tensor:
        (tensor,) = tensors
        return tensor if tensor.shape[2] == num_inputs else tensor.transpose(1, 2).contiguous()

    return Entry(native, (name,), to_native, lambda tensor: [tensor.transpose(1, 2).contiguous()], halves, stacked=True)


def gated_mlp_entries(ours: str, theirs: str) -> list[Entry]:
    """A layer's dense MLP."""
    return [
        gated(f"{ours}mlp.linear_fc1.weight", f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight"),
        direct(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight"),
    ]


def language_entries(
    num_layers: int,
    num_groups: int,
    head_dim: int,
    prefix: str,
    qk_norm: bool,
    qkv_bias: bool,
    mlp_entries: Callable[[str, str], list[Entry]] = gated_mlp_entries,
) -> list[Entry]:
    """Entries of a Llama/Qwen decoder: embedding, layers, final norm (the output layer is the family's to add).

    Args:
        num_layers: decoder layers.
        num_groups: key/value groups.
        head_dim: size of a head.
        prefix: what the Hugging Face names of the decoder begin with, e.g. `model.language_model.`.
        qk_norm: whether queries and keys are normalised.
        qkv_bias: whether their projections have biases.
        mlp_entries: entries of a layer's MLP, from our prefix of the layer and theirs.
    """
    entries = [
        direct("language.embedding.word_embeddings.weight", f"{prefix}embed_tokens.weight"),
        direct("language.decoder.final_layernorm.weight", f"{prefix}norm.weight"),
    ]
    for number in range(num_layers):
        ours, theirs = f"language.decoder.layers.{number}.", f"{prefix}layers.{number}."
        attention = f"{ours}self_attention."
        for kind in ("weight", "bias") if qkv_bias else ("weight",):
            query, key, value = (f"{theirs}self_attn.{x}_proj.{kind}" for x in "qkv")
            entries.append(split_qkv(f"{attention}linear_qkv.{kind}", (query, key, value), num_groups, head_dim))
        if qk_norm:
            entries += [direct(f"{attention}{x}_layernorm.weight", f"{theirs}self_attn.{x}_norm.weight") for x in "qk"]
        entries += [
            direct(f"{attention}linear_proj.weight", f"{theirs}self_attn.o_proj.weight"),
            direct(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight"),
            direct(f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight"),
            *mlp_entries(ours, theirs),
        ]
    return entries


@dataclass(frozen=True)
class RowRun:
    """Rows that lie behind each other.

    Attributes:
        name: Hugging Face name of the tensor that they are of.
        start: the first.
        num_rows: how many.
    """

    name: str
    start: int
    num_rows: int


def row_runs(entry: Entry, shapes: Sequence[tuple[int, ...]]) -> list[RowRun]:
    """Of which rows a native parameter consists, in its order; for entries that move whole rows.

    `to_native` says so itself: it is given tensors in which each row is a number.

    Args:
        entry: with `moves_rows`.
        shapes: of its Hugging Face tensors; one without dimensions counts as a row.
    """
    assert entry.moves_rows, entry.native
    first_numbers, numbered = [], []
    number = 0
    for shape in shapes:
        num_rows = math.prod(shape[:1])
        numbers = torch.arange(number, number + num_rows)
        numbered.append(numbers.reshape((*shape[:1], *(1 for _ in shape[1:]))))
        first_numbers.append(number)
        number += num_rows + 1  # a number is left out, so that no run goes from one tensor into the next
    order = entry.to_native(numbered).flatten()
    cuts = (order.diff() != 1).nonzero().flatten() + 1
    runs = []
    for run in order.tensor_split(cuts) if len(order) else ():
        source = bisect.bisect_right(first_numbers, int(run[0])) - 1
        runs.append(RowRun(entry.names[source], int(run[0]) - first_numbers[source], len(run)))
    return runs


def check_names(entries: Iterable[Entry], names: Iterable[str], ignored: Iterable[str], where: str) -> None:
    """Every tensor is used exactly once.

    Raises:
        UseError: lists names that are missing, or left over, in the Hugging Face directory `where`.
    """
    wanted = [name for entry in entries for name in entry.names]
    assert len(wanted) == len(set(wanted)), "a Hugging Face tensor is mapped twice"
    found, skipped = set(names), set(ignored)
    missing, left_over = sorted(set(wanted) - found), sorted(found - set(wanted) - skipped)
    if missing or left_over:
        raise UseError(
            f"{where}: got {len(found)} tensors; expected {len(wanted)}; "
            f"missing: {_some(missing)}; left over: {_some(left_over)}; "
            "fix: give the complete checkpoint that this config.json belongs to"
        )


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

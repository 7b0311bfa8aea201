"""Frozen weights in 4 bits (QLoRA), each tensor-parallel rank with its part of what bitsandbytes makes of the whole.

bitsandbytes quantises a Hugging Face tensor in blocks of 64 values that lie behind each other in a row, with one scale
each; with double quantisation the scales are 8-bit numbers in groups of 256, with one scale for each group, around
their common mean. Rows may be put into another order, and cut between blocks, without changing a value. So a rank keeps
its rows (or columns) of the codes and of the scales, all the few scales of groups, and for each row the number that it
had; any layout has the values that one process has.

Source: QLoRA (arXiv 2305.14314); values equal to those of bitsandbytes.functional 0.50.

Shape suffixes: O rows that this rank has, I inputs that it has, N inputs of the whole tensor, B blocks of a row of this
rank, G groups.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megavlm.config.peft import PeftConfig
from megavlm.config.tuning import TuningPlan
from megavlm.errors import use_error
from megavlm.models.linear import AdaptableLinear
from megavlm.models.names import Part, component_of, layer_of, stacked_name
from megavlm.models.weight_map import Entry
from megavlm.peft.targets import held_rows, linears_of
from megavlm.platform.capabilities import require

BLOCK = 64
GROUP = 256


@dataclass(frozen=True)
class Quantised:
    """What bitsandbytes makes of one matrix.

    Attributes:
        codes: uint8 [out, N / 2], two values in each.
        scales: [out, N / 64], of blocks: fp32, or uint8 numbers into `levels`.
        groups: fp32 [G], with double quantisation, scales of 256 scales.
        levels: fp32 [256], what the numbers stand for.
        mean: fp32, of the scales.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor
    levels: torch.Tensor
    mean: torch.Tensor


def quantise(matrix: torch.Tensor, quant_type: str, double: bool) -> Quantised:
    """Quantise a matrix [out, N] as bitsandbytes does."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        matrix.contiguous(), blocksize=BLOCK, compress_statistics=double, quant_type=quant_type
    )
    num_rows = len(matrix)
    codes, scales = packed.view(num_rows, -1), state.absmax.view(num_rows, -1)
    if not double:
        empty = scales.new_zeros(0)
        return Quantised(codes, scales, empty, empty, scales.new_zeros(()))
    return Quantised(codes, scales, state.state2.absmax, state.state2.code, state.offset)


class QuantisedWeight:
    """This rank's part of a linear's weight."""

    def __init__(
        self,
        parts: Sequence[Quantised],
        in_order: Callable[[Sequence[torch.Tensor]], torch.Tensor],
        rows: torch.Tensor,
        columns: tuple[int, int],
        dtype: torch.dtype,
        quant_type: str,
    ) -> None:
        """Cut this rank's part.

        Args:
            parts: the quantised Hugging Face tensors that the weight is made of.
            in_order: puts their rows into the weight's order.
            rows: numbers of the weight's rows that this rank has.
            columns: into how many parts columns are cut, and which of them this rank has.
            dtype: of the matrix.
            quant_type: nf4 or fp4.
        """
        size, rank = columns

        def own(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            return in_order(tensors)[rows].chunk(size, dim=1)[rank].contiguous()

        device = parts[0].codes.device
        self._codes, self._scales = own([part.codes for part in parts]), own([part.scales for part in parts])
        self._dtype, self._quant_type = dtype, quant_type
        self._levels, self._groups = parts[0].levels, torch.cat([part.groups for part in parts])
        num_blocks = parts[0].scales.shape[1]
        firsts, bases, means = [], [], []
        base = 0
        for part in parts:
            numbers = torch.arange(len(part.scales), device=device)[:, None]
            firsts.append(numbers * num_blocks)
            bases.append(torch.full_like(numbers, base))
            means.append(torch.full_like(numbers, 0, dtype=torch.float32) + part.mean)
            base += len(part.groups)
        # of each row: the number of its first block in its tensor, where its tensor's groups begin, its tensor's mean
        self._first_O1 = (in_order(firsts)[rows] + rank * self._scales.shape[1]).to(torch.int32)
        self._base_O1, self._mean_O1 = in_order(bases)[rows].to(torch.int32), in_order(means)[rows]

    @property
    def num_bytes(self) -> int:
        """Memory that this takes."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))

    def matrix(self) -> torch.Tensor:
        """[O, I]: the weight, made anew with each call."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        scales_OB = self._scales
        if len(self._groups):
            blocks = torch.arange(scales_OB.shape[1], device=scales_OB.device)
            groups_OB = self._base_O1 + (self._first_O1 + blocks) // GROUP
            scales_OB = self._levels[scales_OB.int()] * self._groups[groups_OB] + self._mean_O1
        shape = torch.Size((len(self._codes), 2 * self._codes.shape[1]))
        state = QuantState(
            absmax=scales_OB.flatten(), shape=shape, dtype=self._dtype, blocksize=BLOCK, quant_type=self._quant_type
        )
        matrix: torch.Tensor = dequantize_4bit(self._codes.view(-1, 1), state)
        return matrix


def is_quantised(name: str, plan: TuningPlan, peft: PeftConfig) -> bool:
    """Whether a linear of this (global) name has its weight in 4 bits: where it is frozen, in components that are."""
    component = component_of(name)
    if peft.bnb_4bit_quant_type == "none" or component not in peft.quantized_components:
        return False
    return plan.of(component, layer_of(name)).method != "full"


@torch.no_grad()
def quantise_frozen(
    parts: Iterable[Part],
    entries: Iterable[Entry],
    plan: TuningPlan,
    peft: PeftConfig,
    read: Callable[[Entry, int | None], list[torch.Tensor]],
    dtype: torch.dtype,
) -> None:
    """Put weights in 4 bits in the place of frozen matrices; the matrices are let go of, one after the other.

    Args:
        parts: of the model, in DDP later.
        entries: weight map of the whole model.
        plan: how each layer learns.
        peft: says what is quantised, and how.
        read: an entry's whole Hugging Face tensors; of an expert, its native matrix.
        dtype: in which the matrices are quantised, and made again.

    Raises:
        UseError: rows do not divide into whole blocks for the ranks.
    """
    if peft.bnb_4bit_quant_type == "none":
        return
    require("bitsandbytes")
    by_native = {entry.native: entry for entry in entries}
    device = torch.device(torch.cuda.current_device())
    for part in parts:
        for name, linear in linears_of(part):
            if not is_quantised(name, plan, peft):
                continue
            native, expert = stacked_name(f"{name}.weight")
            entry = by_native[native]
            whole = [tensor.to(device, dtype) for tensor in read(entry, expert)]
            quantised = [quantise(one, peft.bnb_4bit_quant_type, peft.bnb_4bit_use_double_quant) for one in whole]
            _check_blocks(linear, name)
            _put(linear, entry, expert, quantised, dtype, peft.bnb_4bit_quant_type)


def _put(
    linear: AdaptableLinear,
    entry: Entry,
    expert: int | None,
    quantised: Sequence[Quantised],
    dtype: torch.dtype,
    quant_type: str,
) -> None:
    size, rank = linear.tp_group.size(), linear.tp_group.rank()
    order: Any = entry.to_native if expert is None else lambda tensors: tensors[0]
    rows, columns = torch.arange(linear.output_size), (size, rank)
    if linear.is_column:
        rows, columns = held_rows(linear.output_size, size, rank, entry.halves), (1, 0)
    store = QuantisedWeight(quantised, order, rows.to(quantised[0].codes.device), columns, dtype, quant_type)
    del linear.weight
    linear.weight = torch.empty(0, dtype=dtype, device=quantised[0].codes.device)
    linear.store = store


def _check_blocks(linear: AdaptableLinear, name: str) -> None:
    size = 1 if linear.is_column else linear.tp_group.size()
    if linear.input_size % (BLOCK * size):
        raise use_error(
            "peft.bnb_4bit_quant_type",
            f"{name} with {linear.input_size} inputs on {size} tensor rank(s)",
            f"a multiple of {BLOCK * size} inputs: blocks of {BLOCK} values are not cut",
            "use fewer tensor ranks, or leave the component out of peft.quantized_components",
        )


def quantised_values(tensor: torch.Tensor, peft: PeftConfig, dtype: torch.dtype) -> torch.Tensor:
    """What a whole Hugging Face matrix is after quantisation: what a run computed with."""
    one = quantise(tensor.to(dtype), peft.bnb_4bit_quant_type, peft.bnb_4bit_use_double_quant)
    rows = torch.arange(len(tensor), device=tensor.device)
    return QuantisedWeight([one], lambda tensors: tensors[0], rows, (1, 0), dtype, peft.bnb_4bit_quant_type).matrix()

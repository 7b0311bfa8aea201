"""LoRA inside Megatron-Core's linears: low-rank matrices per Hugging Face projection, under tensor parallelism.

    output += scaling * B (A input)

A column-parallel linear has A on every tensor-parallel rank and its rows of B; a row-parallel one has its columns of A,
and B on every rank. What travels between the ranks is the product with A, `rank` numbers a token: under sequence
parallelism it is gathered (column) or reduced and scattered (row), else its gradient, or it itself, is summed. So with
sequence parallelism the matrix that every rank has sees a part of the tokens; its gradient is summed with those of the
norms. Experts' linears leave all this to the dispatcher of tokens, whose sums take the adapter's addends with them;
there the gradient of the matrix that every rank has is summed where it is used.

Source: LoRA (arXiv 2106.09685), rank-stabilised LoRA (arXiv 2312.03732), DoRA (arXiv 2402.09353); numbers as in peft.

Shape suffixes: S tokens (of this rank's sequence part, or all), R rank, of all projections of the linear together, I
inputs, O outputs that this rank has.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import nn

from megavlm.models.linear import AdaptableLinear, LinearAdapter, Output, weight_of
from megavlm.peft.dora import changed_norms, squares_of_rows
from megavlm.peft.splits import Lies, splits_of
from megavlm.peft.targets import Projection, Target, seed_of

LIES: Lies = {"lora_A": "by input", "lora_B": "by output", "lora_magnitude_vector": "by output"}


class LowRank(nn.Module):
    """The matrices of one projection: `lora_A` [rank, in] and `lora_B` [out, rank], this rank's part of each.

    A rank that has no row of the projection has no `lora_B`. `lora_magnitude_vector` [out] is there with DoRA.
    """

    def __init__(self, rank: int, num_inputs: int, projection: Projection, use_dora: bool, like: torch.Tensor) -> None:
        super().__init__()
        num_outputs = len(projection.rows)
        self.lora_A = nn.Parameter(like.new_empty(rank, num_inputs))
        self.lora_B = nn.Parameter(like.new_zeros(num_outputs, rank)) if num_outputs else None
        has_magnitude = use_dora and num_outputs > 0
        self.lora_magnitude_vector = nn.Parameter(like.new_ones(num_outputs)) if has_magnitude else None

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Both matrices and the magnitudes, with no rows where there are none.

        They are asked for by a call, as DDP waits for gathered parameters when a module is called.
        """
        no_rows = self.lora_A.new_empty(0, len(self.lora_A))
        magnitudes = self.lora_magnitude_vector
        return (
            self.lora_A,
            no_rows if self.lora_B is None else self.lora_B,
            no_rows[:, 0] if magnitudes is None else magnitudes,
        )


class LoraAdapter(LinearAdapter):
    """LoRA of all projections of a linear."""

    def __init__(self, target: Target, scaling: float, dropout: float, use_dora: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.splits = splits_of(target)
        self.scaling, self.dropout = scaling, dropout
        like = torch.empty(0, dtype=dtype, device=torch.cuda.current_device())
        rank, num_inputs = target.tuning.rank, self.splits.num_inputs
        self.projections = nn.ModuleDict(
            {one.name: LowRank(rank, num_inputs, one, use_dora, like) for one in target.projections}
        )
        self.splits.mark(self.projections, LIES)
        self.squares_O: torch.Tensor | None = None
        if use_dora:
            self.squares_O = squares_of_rows(weight_of(target.linear), self._split_group)

    @property
    def _split_group(self) -> dist.ProcessGroup | None:
        """Ranks that have parts of a weight's rows; None: this one has whole rows."""
        return None if self.splits.is_column or not self.splits.spread else self.splits.group

    def forward(self, linear: AdaptableLinear, input_: torch.Tensor) -> Output:
        """The linear's output and what the matrices add to it; with DoRA, then scaled row by row."""
        output, bias, taken = linear.run_and_take(input_)
        if self.squares_O is None:
            return output + self.added(taken), bias
        own_bias = linear.own_bias
        if own_bias is not None:
            output = output - own_bias
        output = (output + self.added(taken)) * self.magnitudes(weight_of(linear)).to(output.dtype)
        return output if own_bias is None else output + own_bias, bias

    def magnitudes(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """[O] fp32: DoRA's factor on each row, its learned norm over the norm it has now, which counts as constant.

        Source: DoRA, equation 11; rows of projections without an adapter keep theirs.
        """
        assert self.squares_O is not None
        norms_O = changed_norms(self.squares_O, weight_OI, *self.joined(), self.scaling, self._split_group)
        learned = torch.cat([one()[2] for one in self.projections.values()]).float()
        if len(learned) == self.splits.num_outputs:
            return self.splits.in_order(learned, 0.0) / norms_O
        assert self.splits.places is not None
        is_learned_O = self.splits.places.to(norms_O.device) < len(learned)
        return torch.where(is_learned_O, self.splits.in_order(learned, 0.0) / norms_O, 1.0)

    def added(self, input_S1I: torch.Tensor) -> torch.Tensor:
        """What is added to the output; on the ranks of an expert's row-parallel linear, this rank's addend of it."""
        matrix_RI, matrix_OR = self.joined()
        splits = self.splits
        if splits.is_expert and splits.spread:
            if splits.is_column:
                matrix_RI = copy_to_tensor_model_parallel_region(matrix_RI, group=splits.group)
            else:
                matrix_OR = copy_to_tensor_model_parallel_region(matrix_OR, group=splits.group)
        low_S1R = F.linear(self._dropped(input_S1I), matrix_RI) * self.scaling
        if splits.spread and not splits.is_expert:
            low_S1R = self._exchanged(low_S1R)
        return F.linear(low_S1R, matrix_OR)

    def _exchanged(self, low_S1R: torch.Tensor) -> torch.Tensor:
        exchanged: torch.Tensor
        splits, group = self.splits, self.splits.group
        if splits.is_column and splits.sequence_parallel:
            exchanged = gather_from_sequence_parallel_region(low_S1R, tensor_parallel_output_grad=True, group=group)
        elif splits.is_column:
            exchanged = copy_to_tensor_model_parallel_region(low_S1R, group=group)
        elif splits.sequence_parallel:
            exchanged = reduce_scatter_to_sequence_parallel_region(low_S1R, group=group)
        else:
            exchanged = reduce_from_tensor_model_parallel_region(low_S1R, group=group)
        return exchanged

    def _dropped(self, input_: torch.Tensor) -> torch.Tensor:
        """Dropout; ranks that have the same input drop the same of it, ranks that have parts of it do not."""
        if not self.dropout or not self.training:
            return input_
        if self.splits.is_column and not self.splits.sequence_parallel:
            return F.dropout(input_, self.dropout)
        with get_cuda_rng_tracker().fork():
            return F.dropout(input_, self.dropout)

    def joined(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The projections' matrices A one below the other [R, I], and B with 0 where a row reads another's A [O, R].

        One product with such a B is cheaper than one for each projection and bringing their outputs into order.
        """
        pairs = [one() for one in self.projections.values()]
        if len(pairs) == 1:
            return pairs[0][0], self.splits.in_order(pairs[0][1], 0.0)
        blocks = torch.block_diag(*(pair[1] for pair in pairs))
        return torch.cat([pair[0] for pair in pairs]), self.splits.in_order(blocks, 0.0)

    @torch.no_grad()
    def merged(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """This rank's part of the weight with the adapter in it, computed in fp32."""
        matrix_RI, matrix_OR = self.joined()
        changed_OI = weight_OI.float() + self.scaling * (matrix_OR.float() @ matrix_RI.float())
        return changed_OI if self.squares_O is None else self.magnitudes(weight_OI)[:, None] * changed_OI

    def part_of(self, projection: str, kind: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole matrix or vector; `kind` is its name in LowRank."""
        return self.splits.part_of(projection, kind, whole, LIES)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Sharded weights by projection."""
        assert metadata is not None
        return self.splits.sharded(self.projections, LIES, f"{prefix}projections.", sharded_offsets, metadata)


def scaling_of(rank: int, alpha: float, use_rslora: bool) -> float:
    """Factor on what the matrices add."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


@torch.no_grad()
def initialise(adapter: LoraAdapter, target: Target, seed: int) -> None:
    """Draw A as peft does (uniform, Kaiming's with a = sqrt 5), from numbers that do not depend on the layout; B is 0.

    DoRA's magnitudes are the norms of the weight's rows. So the model is what it was.

    Args:
        adapter: just made.
        target: what it was made for.
        seed: of the run.
    """
    group = adapter.splits.group
    size, rank = (1, 0) if adapter.splits.is_column else (group.size(), group.rank())
    for projection in target.projections:
        one = adapter.projections[projection.name]
        assert isinstance(one, LowRank)
        num_rows, num_inputs = one.lora_A.shape[0], one.lora_A.shape[1] * size
        generator = torch.Generator().manual_seed(seed_of(seed, f"{target.name}.{projection.name}"))
        whole_RI = torch.rand(num_rows, num_inputs, generator=generator, device="cpu") * 2 - 1
        one.lora_A.copy_(whole_RI.div(math.sqrt(num_inputs)).chunk(size, dim=1)[rank])
        if one.lora_magnitude_vector is not None:
            assert adapter.squares_O is not None
            one.lora_magnitude_vector.copy_(adapter.squares_O[projection.rows.to(adapter.squares_O.device)].sqrt())

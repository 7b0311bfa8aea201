"""The parts of the model that a rank holds, as the pieces that the pipeline runtime runs.

Shape suffixes: S tokens of this rank's sequence part, K slots, H hidden size, V visual tokens (see models/).
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megavlm.config.inputs import Grid
from megavlm.data.image_patches import PixelBytes, normalised
from megavlm.data.sample import Batch
from megavlm.errors import RunError
from megavlm.losses.chunked import ProjectedLogits
from megavlm.losses.masks import LogitsAndMasks
from megavlm.models.head import output_weight
from megavlm.pipeline.actions import Compute, Message
from megavlm.pipeline.runtime import Needs
from megavlm.platform.offload import CpuOffload
from megavlm.train.parts import Parts
from megavlm.train.routes import feature_order
from megavlm.train.shares import StepShares

OnOutput = Callable[[Any, Batch], tuple[torch.Tensor, torch.Tensor, Any]]
"""(logits, or what they are computed from, perhaps with what masks are, and the row) to (sum, count, anything)."""


@dataclass(frozen=True)
class Rows:
    """What a rank needs of the microbatches of one run through a schedule.

    Attributes:
        batches: this data rank's packed rows.
        patches: of the images that this rank's encoder encodes, per microbatch in their order, normalised (float32
            [P, C]) or still bytes; only read on an encoder's first stage.
        shares: who encodes what.
    """

    batches: Sequence[Batch]
    patches: Sequence[PixelBytes | torch.Tensor]
    shares: StepShares


class PartsWork:
    """Forward and backward of this rank's parts, one microbatch at a time; gradients add up in DDP's buffers.

    As in Megatron-Core, gradients of the language model are reduced over data ranks while the last backward pass of a
    chunk runs; those of the encoder start to be behind its last backward pass.
    """

    def __init__(self, parts: Parts, rows: Rows, on_output: OnOutput, num_tokens_of: Callable[[Grid], int]) -> None:
        self._parts, self._rows, self._on_output = parts, rows, on_output
        self._num_tokens_of = num_tokens_of
        self._language = _LanguageWork(parts, rows, on_output)
        self._encoder = _EncoderWork(parts, rows)

    @property
    def results(self) -> list[Any]:
        """Third results of `on_output`, on the last stage."""
        return self._language.results

    def run(self, compute: Compute, needs: Needs) -> torch.Tensor | None:
        """Run one piece (see `pipeline.runtime.Work`)."""
        taken = [part for parts in needs.values() for part in parts]
        if compute.kind in ("E", "EF"):
            return self._encoder.forward(compute.microbatch, taken, keep=compute.kind == "EF")
        if compute.kind == "EB":
            return self._encoder.backward(compute.microbatch, taken)
        if compute.kind == "B":
            return self._language.backward(compute.microbatch, compute.chunk, taken)
        if self._parts.models[compute.chunk].pre_process:
            return self._language.forward(compute.microbatch, compute.chunk, self._features(compute.microbatch, needs))
        (hidden_SKH,) = taken
        return self._language.forward(compute.microbatch, compute.chunk, hidden_SKH)

    def _features(self, microbatch: int, needs: Mapping[Message, list[torch.Tensor]]) -> torch.Tensor | None:
        """All features of this rank's row, in the order of its images; None without images."""
        place = self._parts.groups.place
        assert place is not None
        parts = [part for message in sorted(needs, key=lambda one: one.source) for part in needs[message]]
        if not parts:
            return None
        features_VKH = torch.cat(parts) if len(parts) > 1 else parts[0]
        shares = self._rows.shares.microbatches[microbatch]
        order_V = feature_order(self._parts.groups.topology, shares, place.data, self._num_tokens_of)
        return features_VKH if order_V is None else features_VKH.index_select(0, order_V.to(features_VKH.device))


class _LanguageWork:
    def __init__(self, parts: Parts, rows: Rows, on_output: OnOutput) -> None:
        self._parts, self._rows, self._on_output = parts, rows, on_output
        self._inputs: dict[tuple[int, int], torch.Tensor | None] = {}
        self._outputs: dict[tuple[int, int], torch.Tensor] = {}
        self._backwards_left = [len(rows.batches)] * len(parts.models)
        self.results: list[Any] = []
        self._offload = CpuOffload(parts.models) if parts.offloads else None

    def forward(self, microbatch: int, chunk: int, taken: torch.Tensor | None) -> torch.Tensor:
        """`taken`: hidden states [S, K, H] of the stage before, or, on the first chunk, features [V, K, H]."""
        parts, batch = self._parts, self._rows.batches[microbatch]
        model, wrapped = parts.models[chunk], parts.chunks[chunk]
        if parts.row_tokens and len(batch.tokens_T) != parts.row_tokens:
            raise RunError(
                f"a row has {len(batch.tokens_T)} tokens where parallel.tp_comm_overlap has buffers for "
                f"{parts.row_tokens}; give data.packing_length what the longest sample needs"
            )
        if taken is not None and (parts.trains_encoder or not model.pre_process):
            taken.requires_grad_(torch.is_grad_enabled())
        model.set_input_tensor(None if model.pre_process else taken)
        with wrapped.no_sync(), self._offload() if self._offload else contextlib.nullcontext():
            noise_TH = parts.noise(batch) if model.pre_process else None
            output: Any = run_chunk(wrapped, batch, taken if model.pre_process else None, parts.device, noise_TH)
        if model.post_process:
            output, *masks = output if isinstance(output, tuple) else (output,)
            if parts.chunk_tokens:
                output = ProjectedLogits(output, output_weight(model.language), parts.chunk_tokens)
            if masks:
                output = LogitsAndMasks(output, *masks)
            output, _count, result = self._on_output(output, batch)
            self.results.append(result)
        if torch.is_grad_enabled():
            self._inputs[microbatch, chunk] = taken
            self._outputs[microbatch, chunk] = output
        return output

    def backward(self, microbatch: int, chunk: int, taken: list[torch.Tensor]) -> torch.Tensor | None:
        """Gradient of what the forward pass took, from the gradient of what it gave (nothing on the last stage)."""
        inputs = self._inputs.pop((microbatch, chunk))
        output = self._outputs.pop((microbatch, chunk))
        scale = self._parts.config.grad_scale_func
        if not taken and scale is not None:
            output = scale(output)
        batch = self._rows.batches[microbatch]
        self._parts.models[chunk].show_row(batch.tokens_T, batch.cu_seqlens)
        self._backwards_left[chunk] -= 1
        last = not self._backwards_left[chunk]
        with contextlib.nullcontext() if last else self._parts.chunks[chunk].no_sync():
            # A first stage that trains nothing, and whose row has no image, has nothing to differentiate.
            if output.requires_grad:
                torch.autograd.backward(output, taken[0] if taken else None)
        return None if inputs is None else inputs.grad


class _EncoderWork:
    def __init__(self, parts: Parts, rows: Rows) -> None:
        self._parts, self._rows = parts, rows
        self._part = parts.groups.topology.replica_of(parts.rank)
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        encoder = parts.encoder
        self._offload = CpuOffload([encoder]) if parts.offloads and encoder is not None else None
        self._backwards_left = len(rows.batches)

    def forward(self, microbatch: int, taken: list[torch.Tensor], keep: bool) -> torch.Tensor | None:
        """Features (or hidden states for the next stage) of this encoder's images; None when it has none."""
        assert self._part is not None and self._parts.encoder is not None
        shares = self._rows.shares.microbatches[microbatch]
        keys = shares.images_of(self._part[0].number)
        if not keys:
            return None
        device = self._parts.device
        grid_thw_N3 = torch.tensor([shares.grids[key] for key in keys], device=device)
        if self._parts.encoder.is_first_stage:
            pixels = self._rows.patches[microbatch]
            if isinstance(pixels, PixelBytes):
                inputs = normalised(pixels, device)
            else:
                inputs = pixels.to(device, non_blocking=True)
        else:
            (inputs,) = taken
            inputs.requires_grad_(keep)
        away = self._offload() if self._offload else contextlib.nullcontext()
        with self._parts.encoder_chunk.no_sync(), torch.set_grad_enabled(keep), away:
            output: torch.Tensor = self._parts.encoder_chunk(inputs, grid_thw_N3)
        if keep:
            self._kept[microbatch] = inputs, output
        return output

    def backward(self, microbatch: int, taken: list[torch.Tensor]) -> torch.Tensor | None:
        """Gradient of the hidden states that the forward pass took; None on the first stage, or without images."""
        assert self._part is not None and self._parts.encoder is not None
        grad = None
        if microbatch in self._kept:
            inputs, output = self._kept.pop(microbatch)
            with self._parts.encoder_chunk.no_sync():
                if output.requires_grad:  # not of a first stage that is frozen
                    torch.autograd.backward(output, self._added(taken))
            grad = None if self._parts.encoder.is_first_stage else inputs.grad
        self._backwards_left -= 1
        if not self._backwards_left and self._parts.encoder_chunk.ddp_config.overlap_grad_reduce:
            self._parts.encoder_chunk.start_grad_sync()
        return grad

    def _added(self, taken: list[torch.Tensor]) -> torch.Tensor:
        """Of each data rank's images the gradients of its context ranks added up, one data rank after the other."""
        assert self._parts.encoder is not None
        if not self._parts.encoder.is_last_stage:
            return taken[0]
        num_context = self._parts.groups.topology.context
        sums = []
        for start in range(0, len(taken), num_context):
            total = taken[start]
            for part in taken[start + 1 : start + num_context]:
                total = total + part
            sums.append(total)
        return sums[0] if len(sums) == 1 else torch.cat(sums)


def run_chunk(
    wrapped: torch.nn.Module,
    batch: Batch,
    features_VKH: torch.Tensor | None,
    device: torch.device,
    noise_TH: torch.Tensor | None = None,
) -> Any:
    """One forward pass of a chunk of the language model on a packed row: see `LanguageChunk.forward`."""
    return wrapped(
        features_VKH,
        batch.tokens_T.to(device, non_blocking=True),
        batch.position_ids_3T.to(device, non_blocking=True),
        batch.cu_seqlens.to(device, non_blocking=True),
        batch.real_T.to(device, non_blocking=True),
        None if batch.feature_rows_V is None else batch.feature_rows_V.to(device, non_blocking=True),
        None if noise_TH is None else noise_TH.to(device, non_blocking=True),
    )

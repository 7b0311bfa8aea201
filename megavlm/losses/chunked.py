"""Losses of logits that never exist whole: the output layer and what reads its logits go through a row in pieces.

Forward and backward each make the logits of a piece, use them, and drop them; kept are the hidden states. What Wijmans
et al. (arXiv 2411.09009, section 4) do in one kernel, here in plain products of matrices, with a vocabulary that may be
shared by tensor-parallel ranks.

Shape suffixes: T tokens of this rank, H hidden size, W this rank's part of the vocabulary, K figures of a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Statistics = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits, labels) of some tokens to fp32 figures of each, tokens last."""


@dataclass(frozen=True)
class ProjectedLogits:
    """Logits that are not computed yet: hidden_TH @ weight_WH^T.

    Attributes:
        hidden_TH: input of the output layer, any floating type; it is taken in that of the weight.
        weight_WH: of the output layer.
        chunk_tokens: tokens whose logits may exist at a time.
    """

    hidden_TH: torch.Tensor
    weight_WH: torch.Tensor
    chunk_tokens: int

    @property
    def shape(self) -> torch.Size:
        """[T, W]."""
        return torch.Size((len(self.hidden_TH), len(self.weight_WH)))

    @property
    def device(self) -> torch.device:
        """Where they would be."""
        return self.hidden_TH.device

    def __getitem__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of some tokens, by their indices."""
        return _project(self.hidden_TH[tokens], self.weight_WH)


Logits = torch.Tensor | ProjectedLogits


def over_chunks(statistics: Statistics, logits: ProjectedLogits, labels_T: torch.Tensor) -> torch.Tensor:
    """What `statistics` gives for all tokens, fp32 with tokens last, from one piece of the logits after the other.

    Ranks that share the vocabulary call this with the same number of tokens: they talk in every piece.
    """
    figures: torch.Tensor = _OverChunks.apply(
        logits.hidden_TH, logits.weight_WH, labels_T, statistics, logits.chunk_tokens
    )
    return figures


def _project(hidden_TH: torch.Tensor, weight_WH: torch.Tensor) -> torch.Tensor:
    return hidden_TH.to(weight_WH.dtype) @ weight_WH.t()


class _OverChunks(torch.autograd.Function):
    """Pieces are computed again in the backward pass; the gradient of the weight adds up in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_WH: torch.Tensor,
        labels_T: torch.Tensor,
        statistics: Statistics,
        chunk_tokens: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_TH, weight_WH, labels_T)
        ctx.statistics, ctx.chunk_tokens = statistics, chunk_tokens
        pieces = zip(hidden_TH.split(chunk_tokens), labels_T.split(chunk_tokens), strict=True)
        return torch.cat([statistics(_project(hidden, weight_WH), labels) for hidden, labels in pieces], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        hidden_TH, weight_WH, labels_T = ctx.saved_tensors
        grad_TH = torch.empty_like(hidden_TH)
        grad_WH = torch.zeros_like(weight_WH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        parts = (hidden_TH, labels_T, grad_TH)
        pieces = zip(*(part.split(ctx.chunk_tokens) for part in parts), strict=True)
        for (hidden, labels, grad_hidden), grad in zip(pieces, grads[0].split(ctx.chunk_tokens, dim=-1), strict=True):
            logits = _project(hidden, weight_WH).requires_grad_()
            with torch.enable_grad():
                figures = ctx.statistics(logits, labels)
            (grad_logits,) = torch.autograd.grad(figures, logits, grad)
            del logits, figures
            grad_hidden.copy_(grad_logits @ weight_WH)
            if grad_WH is not None:
                grad_WH += grad_logits.t() @ hidden.to(weight_WH.dtype)
        return grad_TH, None if grad_WH is None else grad_WH.to(weight_WH.dtype), None, None, None

"""The head of a reward model: one number for every token, in place of the output layer over words.

Only that of an answer's last token is read (Hugging Face's sequence classification); the stage picks it.

Shape suffixes: S tokens of this rank's sequence part, L all of this context rank, B is 1, H hidden size.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.models.weight_map import Entry, direct

NATIVE_NAME = "language.output_layer.weight"
HF_NAME = "score.weight"
"""What transformers' sequence classification of decoders, and vLLM's, call it; [labels, hidden], without bias."""


class ScoreHead(MegatronModule):
    """Linear, hidden size to one; the same on every tensor rank. Called like Megatron-Core's output layer."""

    def __init__(self, config: TransformerConfig, tensor_group: dist.ProcessGroup) -> None:
        super().__init__(config=config)
        self._tensor_group = tensor_group
        empty = torch.empty(1, config.hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = torch.nn.Parameter(empty)

    def forward(self, hidden_SBH: torch.Tensor, **_knobs: Any) -> tuple[torch.Tensor, None]:
        """Scores [L, B, 1], the same on every tensor rank; the second result is the bias that there is not."""
        if self.config.sequence_parallel:
            # Every rank goes on with all tokens, and computes the same: the gradient is cut, not added up.
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=False, group=self._tensor_group
            )
        return F.linear(hidden_SBH, self.weight), None


def score_entries(entries: Sequence[Entry]) -> list[Entry]:
    """A family's weight map with this head in place of the output layer."""
    return [*(entry for entry in entries if entry.native != NATIVE_NAME), direct(NATIVE_NAME, HF_NAME)]


def initialise_scores(parameters: Iterable[tuple[str, torch.nn.Parameter]], seed: int) -> None:
    """Fill a new head, alike on every rank: normal with variance 1 / (H + 1) (Stiennon et al., arXiv 2009.01325, C).

    Args:
        parameters: of a part of the model by global names; nothing happens without the head.
        seed: of the run.
    """
    for name, parameter in parameters:
        if name == NATIVE_NAME:
            generator = torch.Generator().manual_seed(seed)
            deviation = (parameter.shape[1] + 1) ** -0.5
            drawn = torch.randn(parameter.shape, generator=generator) * deviation
            with torch.no_grad():
                parameter.copy_(drawn)

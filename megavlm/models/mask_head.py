"""The head of a model that tells which visual tokens of an image a token for a mask stands for.

From the last hidden state of the token a small network makes a query (LISA, arXiv 2308.00692, section 3.2), from those
of visual tokens a linear layer makes what it is multiplied by (MaskFormer, arXiv 2107.06278, section 3.2); the product
is the loss's. The head stands beside the output layer over words, which stays as it is.

Shape suffixes: S tokens of this rank's sequence part, L all of this context rank, B is 1, H hidden size, D width of the
vectors, V visual tokens of this context rank, G its tokens for masks, both in the order in which it holds them.
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

_PREFIX = "language."
NAMES = tuple(
    f"mask_head.{layer}.{kind}" for layer in ("query_in", "query_out", "image") for kind in ("weight", "bias")
)
"""Of its tensors in files; query_in is [H, H], query_out and image are [D, H]."""
NATIVE_NAMES = tuple(f"{_PREFIX}{name}" for name in NAMES)


class MaskHead(MegatronModule):
    """Queries of tokens for masks and vectors of visual tokens, the same on every tensor rank."""

    def __init__(self, config: TransformerConfig, tensor_group: dist.ProcessGroup, width: int) -> None:
        super().__init__(config=config)
        self._tensor_group = tensor_group
        place: dict[str, Any] = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        hidden_size = config.hidden_size
        self.query_in = torch.nn.Linear(hidden_size, hidden_size, **place)
        self.query_out = torch.nn.Linear(hidden_size, width, **place)
        self.image = torch.nn.Linear(hidden_size, width, **place)

    def forward(
        self, hidden_SBH: torch.Tensor, visual_V: torch.Tensor, segments_G: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors of visual tokens [V, D] and of tokens for masks [G, D].

        Args:
            hidden_SBH: what the output layer takes.
            visual_V: int64 numbers of visual tokens among the L of this context rank.
            segments_G: int64 numbers of its tokens for masks.
        """
        if self.config.sequence_parallel:
            # Every rank goes on with all tokens, and computes the same: the gradient is cut, not added up.
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=False, group=self._tensor_group
            )
        hidden_LH = hidden_SBH[:, 0]
        queries_GH = F.relu(self.query_in(hidden_LH.index_select(0, segments_G)))
        return self.image(hidden_LH.index_select(0, visual_V)), self.query_out(queries_GH)


class InputOf:
    """Keeps what a module was called with, until it is taken."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._kept: list[torch.Tensor] = []
        module.register_forward_pre_hook(self._keep)

    def _keep(self, module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        self._kept = [arguments[0]]

    def take(self) -> torch.Tensor:
        """The first argument of the last call."""
        (kept,), self._kept = self._kept, []
        return kept


def mask_entries(entries: Sequence[Entry]) -> list[Entry]:
    """A family's weight map with this head beside the rest."""
    return [*entries, *(direct(native, name) for native, name in zip(NATIVE_NAMES, NAMES, strict=True))]


@torch.no_grad()
def initialise_masks(parameters: Iterable[tuple[str, torch.nn.Parameter]], seed: int) -> None:
    """Fill a new head, alike on every rank: weights normal with variance 1 / H, biases 0.

    Args:
        parameters: of a part of the model by global names; nothing happens without the head.
        seed: of the run.
    """
    for name, parameter in parameters:
        if name not in NATIVE_NAMES:
            continue
        parameter.zero_()
        if name.endswith("weight"):
            generator = torch.Generator().manual_seed(seed + NATIVE_NAMES.index(name))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)

"""The head of an embedding model: a vector for every token, in place of the output layer over words.

Only that of a sequence's last token is read; the stage picks it. What the loss learns beside, CLIP's temperature and
SigLIP's bias, lives in the head as well: so it is on the last pipeline stage, in the optimizer and in checkpoints. So
does the second head of a model that tells texts that belong to images from others: a linear layer to two classes
(ALBEF, Li et al., arXiv 2107.07651, section 3.2; `itm_head` in transformers' BLIP, whose class 1 is a match).

Shape suffixes: S tokens of this rank's sequence part, L all of this context rank, B is 1, H hidden size, D width of an
embedding, X the embedding with scale and bias of logits behind it (D + 2), and logits of the two classes before it,
where there are any.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.config.objectives import LEAST_TEMPERATURE
from megavlm.models.score import NATIVE_NAME
from megavlm.models.weight_map import Entry, direct

SCALE_NAME, BIAS_NAME = "language.output_layer.logit_scale", "language.output_layer.logit_bias"
EMBEDDING_NAMES = {NATIVE_NAME: "embedding_head.weight", SCALE_NAME: "logit_scale", BIAS_NAME: "logit_bias"}
"""The head [D, H] without bias; the others, [1], are called as transformers' CLIP and SigLIP call theirs."""
MATCH_WEIGHT, MATCH_BIAS = "language.output_layer.itm_weight", "language.output_layer.itm_bias"
MATCH_NAMES = {MATCH_WEIGHT: "itm_head.weight", MATCH_BIAS: "itm_head.bias"}
"""[2, H] and [2]."""
NUM_LOGIT_COLUMNS = 2
NUM_CLASSES = 2
MAX_LOGIT_SCALE = -math.log(LEAST_TEMPERATURE)


class EmbeddingHead(MegatronModule):
    """Linear, hidden size to D; the same on every tensor rank. Called like Megatron-Core's output layer.

    `logit_scale` is the natural logarithm of 1 / temperature.
    """

    def __init__(
        self, config: TransformerConfig, tensor_group: dist.ProcessGroup, embedding_dim: int, matches: bool = False
    ) -> None:
        super().__init__(config=config)
        self._tensor_group = tensor_group
        empty = torch.empty(
            embedding_dim, config.hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        self.weight = torch.nn.Parameter(empty)
        self.logit_scale = torch.nn.Parameter(empty.new_zeros(1))
        self.logit_bias = torch.nn.Parameter(empty.new_zeros(1))
        self.matches = matches
        if matches:
            self.itm_weight = torch.nn.Parameter(empty.new_empty(NUM_CLASSES, config.hidden_size))
            self.itm_bias = torch.nn.Parameter(empty.new_zeros(NUM_CLASSES))

    def forward(self, hidden_SBH: torch.Tensor, **_knobs: Any) -> tuple[torch.Tensor, None]:
        """[L, B, X], the same on every tensor rank; the second result is the bias that there is not.

        Scale and bias of logits stand behind each embedding: the loss gets them, and gives gradients, that way.
        """
        if self.config.sequence_parallel:
            # Every rank goes on with all tokens, and computes the same: the gradient is cut, not added up.
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=False, group=self._tensor_group
            )
        embeddings_LBD = F.linear(hidden_SBH, self.weight)
        beside = torch.cat((self.logit_scale, self.logit_bias)).expand(*embeddings_LBD.shape[:2], NUM_LOGIT_COLUMNS)
        columns = [embeddings_LBD, beside]
        if self.matches:
            columns.insert(0, F.linear(hidden_SBH, self.itm_weight, self.itm_bias))
        return torch.cat(columns, dim=-1), None


def embedding_entries(entries: Sequence[Entry], matches: bool = False) -> list[Entry]:
    """A family's weight map with this head, or with both, in place of the output layer."""
    rest = [entry for entry in entries if entry.native != NATIVE_NAME]
    names = EMBEDDING_NAMES | MATCH_NAMES if matches else EMBEDDING_NAMES
    return [*rest, *(direct(native, name) for native, name in names.items())]


@torch.no_grad()
def initialise_embeddings(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], seed: int, temperature: float, logit_bias: float
) -> None:
    """Fill new heads, alike on every rank: normal with variance 1 / H, as CLIP's projections; the classes' bias is 0.

    (Radford et al., arXiv 2103.00020; openai/CLIP@a1d0717, clip/model.py `initialize_parameters`.)

    Args:
        parameters: that are new, of a part of the model by global names.
        seed: of the run.
        temperature: at the start.
        logit_bias: at the start.
    """
    for name, parameter in parameters:
        if name in (NATIVE_NAME, MATCH_WEIGHT):
            generator = torch.Generator().manual_seed(seed + (name == MATCH_WEIGHT))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
        elif name == SCALE_NAME:
            parameter.fill_(-math.log(temperature))
        elif name == BIAS_NAME:
            parameter.fill_(logit_bias)
        elif name == MATCH_BIAS:
            parameter.zero_()


@torch.no_grad()
def clamp_logit_scale(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Let logits be scaled by 100 at most (arXiv 2103.00020, section 2.5); behind every update.

    The optimizer's own copy is clamped with the parameter: in bf16 and fp16 it is what learns.

    Args:
        parameters: of a part of the model by global names; nothing happens without the head.
    """
    for name, parameter in parameters:
        if name == SCALE_NAME:
            parameter.clamp_(max=MAX_LOGIT_SCALE)
            main = vars(parameter).get("main_param")
            if main is not None:
                main.clamp_(max=MAX_LOGIT_SCALE)

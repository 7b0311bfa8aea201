"""Losses on pairs of answers that need no reference policy: CPO, SimPO, ORPO.

`REFERENCE_FREE_LOSSES` holds them by the names that ms-swift gives them as `rlhf_type`. Of `PairLogprobs` they read the
policy's part only.

Shape suffixes: P pairs of this microbatch.
Which variant of a formula: as in huggingface/trl v1.16.0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from megavlm.errors import use_error
from megavlm.losses.preference import PAIR_LOSSES, PairLogprobs, PreferenceOptions, reward_metrics

_LN_2 = 0.6931471805599453


@dataclass(frozen=True)
class ReferenceFreeOptions:
    """Knobs of the losses without a reference, named as in TRL and ms-swift.

    Attributes:
        beta: scale of the implicit rewards; ORPO's weight of the odds ratio (lambda in its paper).
        loss_type: CPO's loss on the margin.
        cpo_alpha: weight of the chosen answers' negative log-likelihood in CPO and SimPO.
        simpo_gamma: SimPO's target margin.
        label_smoothing: probability that the two answers were confused; read by CPO's sigmoid and SimPO.
    """

    beta: float = 0.1
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    cpo_alpha: float = 1.0
    simpo_gamma: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.loss_type not in ("sigmoid", "hinge", "ipo"):
            raise use_error("loss_type", self.loss_type, "sigmoid, hinge or ipo", "name one of them")
        if self.beta <= 0:
            raise use_error("beta", self.beta, "a number above 0", "set it, e.g. to 0.1")
        if not 0 <= self.label_smoothing < 0.5:
            raise use_error("label_smoothing", self.label_smoothing, "0 or more, below 0.5", "set it, e.g. to 0.1")


# The loss of each pair, and the implicit rewards of both answers.
_PerPair = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def cpo(logprobs: PairLogprobs, options: ReferenceFreeOptions) -> _PerPair:
    """CPO, arXiv 2401.08417: DPO against a uniform reference, and the chosen answers' negative log-likelihood."""
    pair_options = PreferenceOptions((options.loss_type,), beta=options.beta, label_smoothing=options.label_smoothing)
    loss_P = PAIR_LOSSES[options.loss_type](logprobs.without_reference(), pair_options)
    scored = logprobs.per_token() if options.loss_type == "ipo" else logprobs
    loss_P = loss_P + options.cpo_alpha * logprobs.chosen_nll_P
    return loss_P, options.beta * scored.chosen_P, options.beta * scored.rejected_P


def simpo(logprobs: PairLogprobs, options: ReferenceFreeOptions) -> _PerPair:
    """SimPO, arXiv 2405.14734, equation 6: rewards are means over tokens, with a target margin.

    A `cpo_alpha` other than 0 gives CPO-SimPO; the paper's SimPO has none.
    """
    means = logprobs.per_token()
    chosen_P, rejected_P = options.beta * means.chosen_P, options.beta * means.rejected_P
    margin_P, smoothing = chosen_P - rejected_P - options.simpo_gamma, options.label_smoothing
    loss_P = -F.logsigmoid(margin_P) * (1 - smoothing) - F.logsigmoid(-margin_P) * smoothing
    return loss_P + options.cpo_alpha * logprobs.chosen_nll_P, chosen_P, rejected_P


def log_one_minus_exp(values: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, exact near 0 and far from it (Maechler 2012, equation 7).

    Each branch is fed values of its own side only: a gradient of the other would be infinite times 0.
    """
    near = values > -_LN_2
    near_values = torch.where(near, values, torch.full_like(values, -_LN_2))
    far_values = torch.where(near, torch.full_like(values, -_LN_2), values)
    return torch.where(near, torch.log(-torch.expm1(near_values)), torch.log1p(-torch.exp(far_values)))


def orpo(logprobs: PairLogprobs, options: ReferenceFreeOptions) -> _PerPair:
    """ORPO, arXiv 2403.07691, equations 4, 6 and 7: negative log-likelihood of the chosen, and the log odds ratio.

    Likelihoods are geometric means over an answer's tokens. As in the paper the negative log-likelihood is the
    answer's; TRL's is over prompt and answer.
    """
    means = logprobs.per_token()
    log_odds_P = (means.chosen_P - log_one_minus_exp(means.chosen_P)) - (
        means.rejected_P - log_one_minus_exp(means.rejected_P)
    )
    loss_P = logprobs.chosen_nll_P - options.beta * F.logsigmoid(log_odds_P)
    return loss_P, options.beta * means.chosen_P, options.beta * means.rejected_P


REFERENCE_FREE_LOSSES: dict[str, Callable[[PairLogprobs, ReferenceFreeOptions], _PerPair]] = {
    "cpo": cpo,
    "simpo": simpo,
    "orpo": orpo,
}


def reference_free_loss(
    name: Literal["cpo", "simpo", "orpo"], logprobs: PairLogprobs, options: ReferenceFreeOptions
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """One of `REFERENCE_FREE_LOSSES`.

    Returns:
        The sum over pairs (fp32), the number of pairs (fp32), and the metrics of `preference.reward_metrics`.
    """
    loss_P, chosen_P, rejected_P = REFERENCE_FREE_LOSSES[name](logprobs.in_fp32(), options)
    return loss_P.sum(), loss_P.new_tensor(float(loss_P.numel())), reward_metrics(chosen_P, rejected_P)

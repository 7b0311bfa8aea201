"""Losses on single answers that are marked good or bad, against a reference policy: KTO and unpaired APO-zero.

Shape suffixes: S answers of this microbatch.
Sources: Ethayarajh et al., arXiv 2402.01306, equations 7 and 8; D'Oosterlinck et al., arXiv 2408.06266, equation 7.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from megavlm.errors import use_error


@dataclass(frozen=True)
class KtoOptions:
    """Knobs, named as in TRL and ms-swift.

    Attributes:
        loss_type: `apo_zero_unpaired` uses no KL estimate.
        beta: how closely the policy keeps to the reference.
        desirable_weight: weight of good answers.
        undesirable_weight: weight of bad ones.
    """

    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.loss_type not in ("kto", "apo_zero_unpaired"):
            raise use_error("loss_type", self.loss_type, "kto or apo_zero_unpaired", "name one of them")
        if self.beta <= 0:
            raise use_error("beta", self.beta, "a number above 0", "set it, e.g. to 0.1")


def kl_sums(policy_S: torch.Tensor, reference_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What KTO's estimate of KL(policy || reference) is made of.

    Args:
        policy_S: summed log-probabilities of answers that belong to OTHER prompts (the paper's x and y').
        reference_S: those of the reference.

    Returns:
        Sum of log ratios and number of answers, both fp32 and without gradient. Add them up over the ranks of the
        global batch, and give both to `kl_estimate`.
    """
    ratio_S = (policy_S.float() - reference_S.float()).detach()
    return ratio_S.sum(), ratio_S.new_tensor(float(ratio_S.numel()))


def kl_estimate(ratio_sum: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The reference point z0 of KTO: mean log ratio, at least 0."""
    return (ratio_sum / count).clamp(min=0)


def kto_loss(
    policy_S: torch.Tensor,
    reference_S: torch.Tensor,
    desirable_S: torch.Tensor,
    kl: torch.Tensor,
    options: KtoOptions,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Prospect-theoretic loss of single answers.

    Args:
        policy_S: log policy(answer | prompt), summed over the answer's tokens.
        reference_S: that of the reference, without gradient.
        desirable_S: bool, whether the answer is a good one.
        kl: the reference point, a scalar of `kl_estimate`; `apo_zero_unpaired` does not read it.
        options: the knobs.

    Returns:
        The sum over answers (fp32), their number (fp32), and sums of rewards with the counts they are to be divided by.
    """
    ratio_S = policy_S.float() - reference_S.float()
    point = kl.detach().float() if options.loss_type == "kto" else ratio_S.new_zeros(())
    sign_S = torch.where(desirable_S, 1.0, -1.0)
    weight_S = torch.where(desirable_S, options.desirable_weight, options.undesirable_weight)
    loss_S = weight_S * torch.sigmoid(-sign_S * options.beta * (ratio_S - point))
    rewards_S = options.beta * ratio_S.detach()
    metrics = {
        "rewards/chosen": rewards_S[desirable_S].sum(),
        "rewards/rejected": rewards_S[~desirable_S].sum(),
        "count/chosen": desirable_S.sum().float(),
        "count/rejected": (~desirable_S).sum().float(),
    }
    return loss_S.sum(), loss_S.new_tensor(float(loss_S.numel())), metrics

"""Losses on pairs of answers, one preferred to the other, against a reference policy.

`PAIR_LOSSES` holds them by the names that TRL and ms-swift give them as `loss_type`. Every one takes the four summed
log-probabilities of a pair and gives a loss per pair. Below, the implicit reward of an answer y to x is
beta * log(policy(y|x) / reference(y|x)), and the margin that of the chosen answer less that of the rejected one.

Shape suffixes: P pairs of this microbatch.
Sources: the paper of each loss in its docstring; which variant of a formula, as in huggingface/trl v1.16.0.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from megavlm.errors import use_error


@dataclass(frozen=True)
class PairLogprobs:
    """What the policy and the reference say about P pairs of answers.

    Attributes:
        chosen_P: log policy(chosen answer | prompt), summed over the answer's tokens.
        rejected_P: the same of the rejected answer.
        reference_chosen_P: log reference(chosen answer | prompt), without gradient.
        reference_rejected_P: the same of the rejected answer.
        num_chosen_tokens_P: tokens of the chosen answers, at least 1.
        num_rejected_tokens_P: tokens of the rejected answers, at least 1.
        mean_chosen_tokens: mean of `num_chosen_tokens_P` over the whole global batch. With it the negative
            log-likelihood is a mean over tokens, as in TRL; without it, over each answer's own, as in the papers.
    """

    chosen_P: torch.Tensor
    rejected_P: torch.Tensor
    reference_chosen_P: torch.Tensor
    reference_rejected_P: torch.Tensor
    num_chosen_tokens_P: torch.Tensor
    num_rejected_tokens_P: torch.Tensor
    mean_chosen_tokens: float | None = None

    def in_fp32(self) -> "PairLogprobs":
        """The same with every tensor in fp32."""
        return PairLogprobs(
            self.chosen_P.float(),
            self.rejected_P.float(),
            self.reference_chosen_P.float(),
            self.reference_rejected_P.float(),
            self.num_chosen_tokens_P.float(),
            self.num_rejected_tokens_P.float(),
            self.mean_chosen_tokens,
        )

    def without_reference(self) -> "PairLogprobs":
        """The same with a reference that gives every answer log-probability 0."""
        zeros_P = torch.zeros_like(self.chosen_P)
        return replace(self, reference_chosen_P=zeros_P, reference_rejected_P=zeros_P)

    def per_token(self) -> "PairLogprobs":
        """The same with means over each answer's tokens in place of sums."""
        return replace(
            self,
            chosen_P=self.chosen_P / self.num_chosen_tokens_P,
            rejected_P=self.rejected_P / self.num_rejected_tokens_P,
            reference_chosen_P=self.reference_chosen_P / self.num_chosen_tokens_P,
            reference_rejected_P=self.reference_rejected_P / self.num_rejected_tokens_P,
        )

    @property
    def chosen_ratio_P(self) -> torch.Tensor:
        """log(policy / reference) of the chosen answers."""
        return self.chosen_P - self.reference_chosen_P

    @property
    def rejected_ratio_P(self) -> torch.Tensor:
        """log(policy / reference) of the rejected answers."""
        return self.rejected_P - self.reference_rejected_P

    @property
    def ratio_margin_P(self) -> torch.Tensor:
        """How much more the policy moved towards the chosen answer than towards the rejected one."""
        return self.chosen_ratio_P - self.rejected_ratio_P

    @property
    def chosen_nll_P(self) -> torch.Tensor:
        """Negative log-likelihood of the chosen answers, over their own or the mean number of tokens."""
        if self.mean_chosen_tokens is None:
            return -self.chosen_P / self.num_chosen_tokens_P
        return -self.chosen_P / self.mean_chosen_tokens


@dataclass(frozen=True)
class PreferenceOptions:
    """Knobs of the losses on pairs, named as in TRL and ms-swift.

    Attributes:
        loss_type: keys of `PAIR_LOSSES`, added up.
        loss_weights: one factor for each; None: 1 for all.
        beta: how closely the policy keeps to the reference; tau of IPO, 1 / eta of SPPO.
        label_smoothing: probability that the two answers of a pair were confused; read by sigmoid, robust, exo_pair,
            aot and aot_unpaired.
        discopop_tau: temperature of DiscoPOP's blend.
        rpo_alpha: weight of the chosen answers' negative log-likelihood beside the loss; None: none.
    """

    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    rpo_alpha: float | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.loss_type if name not in PAIR_LOSSES]
        if unknown or not self.loss_type:
            raise use_error("loss_type", list(self.loss_type), f"names among {', '.join(PAIR_LOSSES)}", "name one")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            expected = f"one weight for each loss_type ({len(self.loss_type)})"
            raise use_error("loss_weights", list(self.loss_weights), expected, "give as many, or none")
        if self.beta <= 0:
            raise use_error("beta", self.beta, "a number above 0", "set it, e.g. to 0.1")
        if not 0 <= self.label_smoothing < 0.5:
            raise use_error("label_smoothing", self.label_smoothing, "0 or more, below 0.5", "set it, e.g. to 0.1")
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise use_error("label_smoothing", 0, "above 0: exo_pair divides by it", "set it, e.g. to 0.001")
        if self.discopop_tau <= 0:
            raise use_error("discopop_tau", self.discopop_tau, "a number above 0", "set it, e.g. to 0.05")


def _smoothed_logistic(margin_P: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Binary cross entropy of "chosen is better" at log-odds `margin_P`, with labels of 1 - label_smoothing."""
    return -F.logsigmoid(margin_P) * (1 - label_smoothing) - F.logsigmoid(-margin_P) * label_smoothing


def sigmoid(logprobs: PairLogprobs, options: PreferenceOptions) -> torch.Tensor:
    """DPO, arXiv 2305.18290, equation 7; with label smoothing, cDPO (Mitchell 2023; see arXiv 2403.00409)."""
    return _smoothed_logistic(options.beta * logprobs.ratio_margin_P, options.label_smoothing)


def sigmoid_norm(logprobs: PairLogprobs, options: PreferenceOptions) -> torch.Tensor:
    """DPO with means over tokens in place of sums: length-normalised DPO, Tulu 3, arXiv 2411.15124."""
    return -F.logsigmoid(options.beta * logprobs.per_token().ratio_margin_P)


def hinge(logprobs: PairLogprobs, options: PreferenceOptions) -> torch.Tensor:
    """SLiC's hinge on DPO's margin, RSO, arXiv 2309.06657."""
    return torch.relu(1 - options.beta * logprobs.ratio_margin_P)


def ipo(logprobs: PairLogprobs, options: PreferenceOptions) -> torch.Tensor:
    """IPO, arXiv 2310.12036, equation 17, with means over tokens, so that long answers do not dominate the square."""
    return (logprobs.per_token().ratio_margin_P - 1 / (2 * options.beta)) ** 2


def robust(logprobs: PairLogprobs, options: PreferenceOptions) -> torch.Tensor:
    """Robust DPO, arXiv 2403.00409: unbiased when a share `label_smoothing` of the labels is flipped."""
    margin_P, smoothing = options.beta * logprobs.ratio_margin_P, options.label_smoothing
    clean_P, flipped_P = -F.logsigmoid(margin_P), -F.logsigmoid(-margin_P)
    return ((1 - smoothing) * clean_P - smoothing * flipped_P) / (1 - 2 * smoothing)


def exo_pair(logprobs: PairLogprobs, options: PreferenceOptions) -> torch.Tensor:
    """EXO-pref, arXiv 2402.00856, equation 16: reverse KL from the policy's preference to the smoothed label."""
    margin_P = options.beta * logprobs.ratio_margin_P
    smoothing = torch.tensor(options.label_smoothing, dtype=margin_P.dtype, device=margin_P.device)
    towards_chosen_P = torch.sigmoid(margin_P) * (F.logsigmoid(margin_P) - torch.log1p(-smoothing))
    towards_rejected_P = torch.sigmoid(-margin_P) * (F.logsigmoid(-margin_P) - torch.log(smoothing))
    return towards_chosen_P + towards_rejected_P


def nca_pair(logprobs: PairLogprobs, options: PreferenceOptions) -> torch.Tensor:
    """NCA for two answers, arXiv 2402.05369: also keeps the chosen answer's likelihood from falling."""
    chosen_P, rejected_P = options.beta * logprobs.chosen_ratio_P, options.beta * logprobs.rejected_ratio_P
    return -F.logsigmoid(chosen_P) - 0.5 * F.logsigmoid(-chosen_P) - 0.5 * F.logsigmoid(-rejected_P)


def bco_pair(logprobs: PairLogprobs, options: PreferenceOptions) -> torch.Tensor:
    """Binary classifier optimisation on pairs, arXiv 2404.04656, without the reward shift."""
    return -F.logsigmoid(options.beta * logprobs.chosen_ratio_P) - F.logsigmoid(
        -options.beta * logprobs.rejected_ratio_P
    )


def sppo_hard(logprobs: PairLogprobs, options: PreferenceOptions) -> torch.Tensor:
    """SPPO, arXiv 2405.00675, equation 4.7, with win probabilities 1 and 0; beta is the paper's 1 / eta."""
    target = 0.5 / options.beta
    return (logprobs.chosen_ratio_P - target) ** 2 + (logprobs.rejected_ratio_P + target) ** 2


def aot(logprobs: PairLogprobs, options: PreferenceOptions) -> torch.Tensor:
    """Alignment by optimal transport, paired, arXiv 2406.05882: the policy's sorted margins over the reference's.

    Sorting is over the pairs given: unlike the other losses, this one depends on which pairs share a microbatch.
    """
    policy_P = (logprobs.chosen_P - logprobs.rejected_P).sort().values
    reference_P = (logprobs.reference_chosen_P - logprobs.reference_rejected_P).sort().values
    return _smoothed_logistic(options.beta * (policy_P - reference_P), options.label_smoothing)


def aot_unpaired(logprobs: PairLogprobs, options: PreferenceOptions) -> torch.Tensor:
    """As `aot`, unpaired: sorted rewards of chosen answers over sorted rewards of rejected ones."""
    margin_P = logprobs.chosen_ratio_P.sort().values - logprobs.rejected_ratio_P.sort().values
    return _smoothed_logistic(options.beta * margin_P, options.label_smoothing)


def apo_zero(logprobs: PairLogprobs, options: PreferenceOptions) -> torch.Tensor:
    """APO-zero, arXiv 2408.06266, equation 7: for chosen answers better than what the model says by itself."""
    return torch.sigmoid(-options.beta * logprobs.chosen_ratio_P) + torch.sigmoid(
        options.beta * logprobs.rejected_ratio_P
    )


def apo_down(logprobs: PairLogprobs, options: PreferenceOptions) -> torch.Tensor:
    """APO-down, arXiv 2408.06266, equation 8: for chosen answers worse than what the model says by itself."""
    return torch.sigmoid(options.beta * logprobs.chosen_ratio_P) + torch.sigmoid(
        -options.beta * logprobs.ratio_margin_P
    )


def discopop(logprobs: PairLogprobs, options: PreferenceOptions) -> torch.Tensor:
    """DiscoPOP (log-ratio modulated), arXiv 2406.08414, equation 5."""
    margin_P = options.beta * logprobs.ratio_margin_P
    blend_P = torch.sigmoid(margin_P / options.discopop_tau)
    return -F.logsigmoid(margin_P) * (1 - blend_P) + torch.exp(-margin_P) * blend_P


def sft(logprobs: PairLogprobs, options: PreferenceOptions) -> torch.Tensor:
    """Negative log-likelihood of the chosen answers; as one of several losses, what MPO (arXiv 2411.10442) adds."""
    return logprobs.chosen_nll_P


PAIR_LOSSES: dict[str, Callable[[PairLogprobs, PreferenceOptions], torch.Tensor]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "hinge": hinge,
    "ipo": ipo,
    "robust": robust,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
}


def reward_metrics(chosen_rewards_P: torch.Tensor, rejected_rewards_P: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over pairs, to be divided by the number of pairs; names as TRL logs them.

    Args:
        chosen_rewards_P: implicit rewards of the chosen answers.
        rejected_rewards_P: and of the rejected ones.
    """
    chosen_P, rejected_P = chosen_rewards_P.detach(), rejected_rewards_P.detach()
    return {
        "rewards/chosen": chosen_P.sum(),
        "rewards/rejected": rejected_P.sum(),
        "rewards/margins": (chosen_P - rejected_P).sum(),
        "rewards/accuracies": (chosen_P > rejected_P).float().sum(),
    }


def preference_loss(
    logprobs: PairLogprobs, options: PreferenceOptions
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted sum of the losses in `options.loss_type`, and with `rpo_alpha` the negative log-likelihood.

    The latter is arXiv 2404.19733's (iterative reasoning preference optimisation).

    Returns:
        The sum over pairs (fp32), the number of pairs (fp32), and the metrics of `reward_metrics`.
    """
    logprobs = logprobs.in_fp32()
    weights = options.loss_weights or (1.0,) * len(options.loss_type)
    loss_P = torch.zeros_like(logprobs.chosen_P)
    for name, weight in zip(options.loss_type, weights, strict=True):
        loss_P = loss_P + weight * PAIR_LOSSES[name](logprobs, options)
    if options.rpo_alpha is not None:
        loss_P = loss_P + options.rpo_alpha * logprobs.chosen_nll_P
    rewards_P = options.beta * logprobs.chosen_ratio_P, options.beta * logprobs.rejected_ratio_P
    return loss_P.sum(), loss_P.new_tensor(float(loss_P.numel())), reward_metrics(*rewards_P)

"""The knobs of training methods, a section of the recipe for each kind of them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SftConfig:
    """Stage sft: what the loss is beside the cross entropy of what is learned."""

    loss_reduction: Literal["token", "square", "sample"] = "token"
    """What the loss is a mean over. token: every learned token counts the same, so long answers count most; sample:
    every row does; square: a row counts by the square root of the number of its learned tokens."""
    label_smoothing_factor: float = 0.0
    """Share of each label that is spread over the whole vocabulary."""
    z_loss_coeff: float = 0.0
    """Weight of the square of the logarithm of softmax's denominator; PaLM's is 1e-4."""
    neftune_noise_alpha: float = 0.0
    """Noise on word embeddings in training: uniform within this / sqrt(tokens of the row * hidden size); 5 to 15 are
    usual."""


@dataclass(frozen=True)
class PreferenceConfig:
    """Stages dpo, cpo, simpo and orpo: rows with a chosen and a rejected answer; kto: rows with a `label`."""

    loss_type: tuple[str, ...] = ()
    """dpo: any of sigmoid (DPO), sigmoid_norm, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero,
    apo_down, discopop, sft (negative log-likelihood of the chosen answer); several are added up. cpo: one of sigmoid,
    hinge, ipo. kto: kto or apo_zero_unpaired. Empty: sigmoid, or kto."""
    loss_weights: tuple[float, ...] = ()
    """dpo: a factor for each loss_type; empty: 1."""
    reference: Literal["cached", "adapter_off"] = "cached"
    """dpo, kto: what the model is compared with. cached: with itself before training, once for every row, which is kept
    in the run folder. adapter_off: with itself without its adapters, by a forward pass more in each step; for rows that
    change from epoch to epoch (data.augment_*), and rows that nobody waits for."""
    beta: float = 0.1
    """How closely the model keeps to the reference; scale of rewards; ORPO's weight of the odds ratio."""
    label_smoothing: float = 0.0
    """Probability that chosen and rejected are confused in a row."""
    rpo_alpha: float = 0.0
    """dpo: weight of the chosen answer's negative log-likelihood beside the loss."""
    discopop_tau: float = 0.05
    cpo_alpha: float = 1.0
    """cpo, simpo: weight of the chosen answer's negative log-likelihood; SimPO's paper has 0."""
    simpo_gamma: float = 0.5
    """simpo: target margin of rewards."""
    desirable_weight: float = 1.0
    """kto: weight of good answers."""
    undesirable_weight: float = 1.0
    """kto: weight of bad answers."""


@dataclass(frozen=True)
class RewardConfig:
    """Stage rm: a score for every answer, from rows with a chosen and a rejected answer. Stage prm: a score for every
    step of an answer, from rows with `completions` (steps) and `labels`.
    """

    center_rewards_coefficient: float = 0.0
    """rm: weight of (chosen + rejected)^2, which keeps scores around 0; 0.01 is usual."""
    score_at: Literal["last_token", "end_of_answer"] = "last_token"
    """rm: the token whose score is the answer's; `last_token` is what Hugging Face's classification reads."""
    step_separator: str = "\n"
    """prm: what stands behind each step; its last token speaks for the step."""
    train_on_last_step_only: bool = False
    """prm: learn the label of an answer's last step only."""

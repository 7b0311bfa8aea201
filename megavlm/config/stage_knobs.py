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
    """Stage rm: a score for every answer, from rows with a chosen and a rejected answer."""

    center_rewards_coefficient: float = 0.0
    """Weight of (chosen + rejected)^2, which keeps scores around 0; 0.01 is usual."""
    score_at: Literal["last_token", "end_of_answer"] = "last_token"
    """The token whose score is the answer's; `last_token` is what Hugging Face's classification reads."""


@dataclass(frozen=True)
class ContrastiveConfig:
    """Stage contrastive: embeddings of images and of their texts, from rows with an image and a caption."""

    loss_type: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: CLIP's, each image among the texts of the global batch and each text among its images; sigmoid:
    SigLIP's, a decision for each image and text of it."""
    embedding_dim: int = 512
    """Numbers of an embedding."""
    temperature: float = 0.0
    """Cosines are divided by it; learned, this is where it starts; 0: 0.07 (softmax), 0.1 (sigmoid). It does not fall
    below 0.01."""
    logit_bias: float = -10.0
    """sigmoid: where the bias of logits starts."""
    image_prompt: str = ""
    """What stands behind the images, in place of the row's own question; empty: the question as it is."""
    text_prompt: str = ""
    """What stands behind the text; empty: nothing."""

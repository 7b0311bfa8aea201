"""The knobs of training methods, a section of the recipe for each kind of them."""

from dataclasses import dataclass
from typing import Literal

WORDLESS_STAGES = ("rm", "prm", "contrastive", "matching")
"""Stages whose model ends in scores or embeddings, in place of words."""


@dataclass(frozen=True)
class TaskWeight:
    """An entry of sft.task_weights."""

    name: str = ""
    """Of a task: an entry of data.mixture_tasks, or, where there are none, of data.mixture."""
    weight: float = 1.0
    """Factor of the loss of its tokens."""


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
    task_weighting: Literal["none", "fixed", "uncertainty", "gradnorm", "loss_ratio"] = "none"
    """Whether the loss of every token is multiplied by a weight of its task; tasks are the data.mixture_tasks, or where
    there are none the sources of data.mixture. The sum is still divided by what tokens weigh without it, so weights of
    1 change nothing. fixed: by task_weights. uncertainty: by exp(-s), with s / 2 added, where s of each task is learned
    (Kendall et al.). gradnorm: such that tasks pull equally hard at the last shared layer, the norm in front of the
    output layer, and harder where they learn slower (Chen et al.). loss_ratio: more where the loss has fallen less
    since the first step (after Liu et al.). Losses and weights of tasks are in the log; held-out rows belong to the
    task that their column `channel` or `task` names, and are judged without weights."""
    task_weights: tuple[TaskWeight, ...] = ()
    """fixed: [{name: charts, weight: 2}, ...]; a task that is left out weighs 1."""
    task_weight_lr: float = 0.025
    """uncertainty, gradnorm: learning rate of s, or of the weights (Adam, constant)."""
    task_weight_alpha: float = 1.5
    """gradnorm: how much harder slow tasks pull; 0: all alike."""
    task_weight_temperature: float = 2.0
    """loss_ratio: of the softmax over tasks; the larger, the more alike their weights."""
    task_weight_momentum: float = 0.9
    """loss_ratio: share of a task's running loss that each step keeps; 0: the loss of the last step."""
    box_loss_coeff: float = 0.0
    """Weight of a loss of whole boxes beside the cross entropy of their tokens: of every box in an answer the place
    that is expected by the probabilities of its four coordinates, against where it is, a mean over the boxes of the
    global batch. It takes data.box_format=bin_tokens_1000."""
    box_l1_weight: float = 5.0
    """Weight of the distance of the four coordinates, as shares of the image's sides (DETR's)."""
    box_giou_weight: float = 2.0
    """Weight of 1 - generalised intersection over union (DETR's)."""
    mask_loss_coeff: float = 0.0
    """Weight of a loss of masks beside the cross entropy of tokens: for every token <seg> in an answer, the row's
    `masks` have what it stands for, and a small head that is trained along tells from the token, and from the tokens of
    the image, which of these belong to it (LISA, with MaskFormer's product). A mean over the masks of the global batch.
    `megavlm add-tokens '<seg>'` gives a model the token."""
    mask_bce_weight: float = 2.0
    """Weight of the binary cross entropy, a mean over a mask's tokens (LISA's)."""
    mask_dice_weight: float = 0.5
    """Weight of Dice (LISA's)."""
    mask_head_dim: int = 256
    """Width of the vectors that the head multiplies."""


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


@dataclass(frozen=True)
class ContrastiveConfig:
    """Stages contrastive and matching: embeddings of images and of their texts, from rows with both."""

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


@dataclass(frozen=True)
class MatchingConfig:
    """Stage matching: whether a text belongs to images, learned from rows as contrastive has them. Each image is shown
    with its own text and with that of another row, and each text is said of another row's image, whose embeddings are
    similar; embeddings are learned beside (section contrastive). Lengths in section data are those of rows without
    these pairs.
    """

    negatives: Literal["sampled", "hardest"] = "sampled"
    """Which other row of the global batch: drawn as likely as softmax of the similarity says (ALBEF), or the most
    similar one. Rows with the same images or the same text are none."""
    max_texts_per_image: int = 4
    """An image is shown with so many texts of others, for memory's sake; a further text takes the image that it has
    drawn next."""
    contrastive_coeff: float = 1.0
    """Weight of the contrastive loss beside that of matching."""
    match_prompt: str = ""
    """What stands behind images and text where they are judged; empty: nothing."""

"""The single-process runs that members of the equivalence class must equal, as a table."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reference:
    """A single-process run: a family, what is frozen, and knobs of the model; `mixed`: rows by `canon.mixed_rows`.

    A `stage` other than sft learns from pairs of answers, or of image and text; `objective` are its knobs, by section.
    """

    family: str
    optimizer: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    mixed: bool = False
    stage: str = "sft"
    objective: dict[str, dict[str, Any]] = field(default_factory=dict)


_SFT_KNOBS = {
    "loss_reduction": "square",
    "label_smoothing_factor": 0.1,
    "z_loss_coeff": 1e-3,
    "neftune_noise_alpha": 5.0,
}


def _tasks(way: str, **knobs: Any) -> Reference:
    """Three tasks, whose weights move far in a few steps."""
    return Reference("qwen3_vl", objective={"sft": {"task_weighting": way, **knobs}})


def _rewards(family: str, score_at: str) -> Reference:
    """Scores are kept so close to 0 that the loss stays far from it: relative distances of it mean something then."""
    reward = {"center_rewards_coefficient": 0.3, "score_at": score_at}
    return Reference(family, {"lr": 3e-4}, stage="rm", objective={"reward": reward})


# At half-time, where runs are resumed, some layers have learned from the start, some since a while, some for one step,
# and some not at all.
_SCHEDULES = {
    "vit_layer_decay": 0.8,
    "llm_layer_decay": 0.9,
    "unfreeze": "0: projector, vision[-2:]; 0.25: language[2:]; 0.45: vision; 12: language",
    "unfreeze_warmup_iters": 3,
    "clip_grad_by": "layer",
    "clip_grad": 0.5,
    "vit_clip_grad": 0.1,
}
_EXPERT_SCHEDULES = _SCHEDULES | {
    "clip_grad_by": "component",
    "unfreeze": "0: projector, vision; 0.25: language[2:]; 12: language",
}


def _contrastive(family: str, **knobs: Any) -> Reference:
    return Reference(
        family, {"lr": 3e-4}, stage="contrastive", objective={"contrastive": {"embedding_dim": 24} | knobs}
    )


def _masks(model: str, peft: dict[str, Any] | None = None) -> Reference:
    objective: dict[str, dict[str, Any]] = {"sft": {"mask_loss_coeff": 1.0, "mask_head_dim": 24}}
    return Reference(model, objective=objective | ({"peft": peft} if peft else {}))


def _matching(family: str, **knobs: Any) -> Reference:
    contrastive = {"embedding_dim": 24, "temperature": 0.3}
    return Reference(family, {"lr": 3e-4}, stage="matching", objective={"contrastive": contrastive, "matching": knobs})


def _tuned(lr: float = 1e-3, **peft: Any) -> Reference:
    return Reference("qwen3_vl", {"lr": lr}, objective={"peft": peft})


def _compared(reference: str) -> Reference:
    """DPO of adapters, which begin at 0: without them the model is what it was."""
    objective = {"preference": {"reference": reference}, "peft": {"tuner_type": "lora"}}
    return Reference("qwen3_vl", stage="dpo", objective=objective)


REFERENCES: dict[str, Reference] = {
    "qwen3_vl": Reference("qwen3_vl"),
    "experts": Reference("qwen3_vl_moe"),
    "experts balanced": Reference("qwen3_vl_moe", model={"moe_aux_loss_coeff": 0.1}),
    "llava": Reference("llava"),
    "llava_next": Reference("llava_next"),
    "llava_onevision": Reference("llava_onevision"),
    "qwen2_5_vl": Reference("qwen2_5_vl"),
    "internvl": Reference("internvl"),
    "internvl_6b": Reference("internvl_6b"),
    "perceiver": Reference("perceiver"),
    "gated_cross_attention": Reference("gated_cross_attention"),
    "qformer": Reference("qformer"),
    "mixture": Reference("qwen3_vl", mixed=True),
    "sft with every knob": Reference("qwen3_vl", objective={"sft": _SFT_KNOBS}),
    "boxes": Reference("qwen3_vl_boxes", objective={"sft": {"box_loss_coeff": 1.0}}),
    "masks": _masks("qwen3_vl_masks"),
    "masks, LLaVA": _masks("llava_masks"),
    "masks, LoRA": _masks("qwen3_vl_masks", {"tuner_type": "lora"}),
    "tasks by uncertainty": _tasks("uncertainty", task_weight_lr=0.2, z_loss_coeff=1e-3, loss_reduction="square"),
    "tasks by gradnorm": _tasks("gradnorm", task_weight_lr=0.1),
    "tasks by loss ratio": _tasks("loss_ratio", task_weight_temperature=0.2, task_weight_momentum=0.5),
    "rm": _rewards("qwen3_vl", "last_token"),
    "rm, untied": _rewards("llava", "end_of_answer"),
    "prm": Reference("qwen3_vl", {"lr": 3e-4}, stage="prm"),
    "dpo": Reference("qwen3_vl", stage="dpo", objective={"preference": {"rpo_alpha": 0.1}}),
    "dpo, experts balanced": Reference("qwen3_vl_moe", stage="dpo", model={"moe_aux_loss_coeff": 0.1}),
    "rows alike, experts balanced": Reference(
        "qwen3_vl_moe", model={"moe_aux_loss_coeff": 0.1}, objective={"sft": {"loss_reduction": "sample"}}
    ),
    "simpo": Reference("qwen3_vl", stage="simpo"),
    "orpo": Reference("qwen3_vl", stage="orpo"),
    "kto": Reference(
        "qwen3_vl", {"lr": 3e-4}, stage="kto", objective={"preference": {"undesirable_weight": 1.5, "beta": 0.3}}
    ),
    "dpo, LoRA": _compared("cached"),
    "dpo, adapters off": _compared("adapter_off"),
    "contrastive": _contrastive("qwen3_vl", temperature=0.3),
    "contrastive, sigmoid": _contrastive("llava", loss_type="sigmoid", logit_bias=-2.0, text_prompt="in one word"),
    "matching": _matching("qwen3_vl", match_prompt="in this image"),
    "matching, hardest": _matching("llava", negatives="hardest", max_texts_per_image=1, contrastive_coeff=2.0),
    "LoRA": _tuned(tuner_type="lora", lorap_lr_ratio=4.0),
    "DoRA": _tuned(tuner_type="lora", use_dora=True),
    "QLoRA": _tuned(tuner_type="lora", bnb_4bit_quant_type="nf4"),
    # Values are left out: with them too little of the gradient is the tower's for a fault there to show.
    "IA3": _tuned(1e-1, tuner_type="ia3", target_modules=("qkv", "linear_fc2", "k_proj", "down_proj")),
    "adapters": _tuned(3e-3, components="vision: adapter, projector: adapter, language: parallel_adapter size=16"),
    "cross-modal adapters": _tuned(
        3e-3, components="vision: frozen, projector: full, language: cross_modal_adapter size=16"
    ),
    "prefix": _tuned(3e-3, components="vision: frozen, projector: lora, language: prefix"),
    "prefix of the tower, frozen language": _tuned(
        5e-2, components="vision: prefix, projector: frozen, language: frozen"
    ),
    "LoRA on experts": Reference(
        "qwen3_vl_moe",
        objective={"peft": {"components": "vision: lora alpha=64, projector: lora, language: lora"}},
    ),
    "schedules": Reference("qwen3_vl", _SCHEDULES),
    "schedules, experts": Reference("qwen3_vl_moe", _EXPERT_SCHEDULES),
    "frozen vision": Reference("qwen3_vl", {"freeze_vit": True}),
    "frozen encoder": Reference("qwen3_vl", {"freeze_vit": True, "freeze_aligner": True}),
    "frozen language": Reference("qwen3_vl", {"freeze_llm": True}),
}

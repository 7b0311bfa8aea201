"""What a recipe says of the training method, and its checks across fields."""

from megavlm.config.schema import Recipe
from megavlm.config.stage_knobs import ContrastiveConfig, MatchingConfig, PreferenceConfig, RewardConfig, SftConfig
from megavlm.config.tuning import tuning_plan
from megavlm.errors import use_error

PAIR_LOSS_TYPES: dict[str, tuple[str, ...]] = {
    "dpo": tuple(
        "sigmoid sigmoid_norm hinge ipo robust exo_pair nca_pair bco_pair sppo_hard apo_zero apo_down discopop "
        "sft".split()
    ),
    "cpo": ("sigmoid", "hinge", "ipo"),
    "simpo": ("sigmoid",),
    "orpo": ("sigmoid",),
    "kto": ("kto", "apo_zero_unpaired"),
}
"""Values of preference.loss_type by stage. AOT, which compares sorted pairs, is none: its value depends on which pairs
share a microbatch."""
IMAGE_TEXT_STAGES = ("contrastive", "matching")
"""Stages that learn embeddings of images and of their texts."""
COMPARING_STAGES = ("rm", "prm", *PAIR_LOSS_TYPES, *IMAGE_TEXT_STAGES)
"""Stages that read sequences whole: they judge answers, or compare images with texts."""
REFERENCE_STAGES = ("dpo", "kto")
LEAST_TEMPERATURE = 0.01
"""Of contrastive logits: CLIP lets them be scaled by 100 at most."""


def loss_types(recipe: Recipe) -> tuple[str, ...]:
    """preference.loss_type, or what it is when nothing is said."""
    return recipe.preference.loss_type or PAIR_LOSS_TYPES[recipe.train.stage][:1]


def check_objective(recipe: Recipe) -> None:
    """Check train.stage against what it reads, and sections that it does not read; and what ends a run early.

    Raises:
        UseError: the first mistake found.
    """
    _check_early_stopping(recipe)
    stage = recipe.train.stage
    if stage != "sft" and recipe.sft != SftConfig():
        raise use_error("sft", f"settings with train.stage {stage}", "none", "remove them, or set train.stage=sft")
    if stage not in PAIR_LOSS_TYPES and recipe.preference != PreferenceConfig():
        raise use_error("preference", f"settings with train.stage {stage}", "none", "remove them, or set train.stage")
    _check_reward(stage, recipe.reward)
    if stage not in IMAGE_TEXT_STAGES and recipe.contrastive != ContrastiveConfig():
        fix = "remove them, or set train.stage=contrastive"
        raise use_error("contrastive", f"settings with train.stage {stage}", "none", fix)
    if stage != "matching" and recipe.matching != MatchingConfig():
        fix = "remove them, or set train.stage=matching"
        raise use_error("matching", f"settings with train.stage {stage}", "none", fix)
    if stage in COMPARING_STAGES and recipe.data.too_long.startswith("cut"):
        raise use_error(
            "data.too_long",
            f"{recipe.data.too_long} with train.stage {stage}",
            "drop or stop: sequences that are compared, or judged, are not cut",
            "set data.too_long=drop",
        )
    if stage in ("rm", "prm") and recipe.optimizer.freeze_llm:
        raise use_error(
            "optimizer.freeze_llm",
            f"true with train.stage {stage}",
            "a language model that learns: the new head for scores is a part of it",
            "set it to false",
        )
    if stage in IMAGE_TEXT_STAGES:
        _check_contrastive(recipe)
    if stage in PAIR_LOSS_TYPES:
        _check_preference(stage, recipe.preference, loss_types(recipe))
        _check_reference(recipe)


_REWARD_STAGES = {
    "center_rewards_coefficient": "rm",
    "score_at": "rm",
    "step_separator": "prm",
    "train_on_last_step_only": "prm",
}
"""Knobs of the section `reward`, and the stage that reads each."""


def _check_reward(stage: str, knobs: RewardConfig) -> None:
    defaults = RewardConfig()
    for name, reader in _REWARD_STAGES.items():
        if stage != reader and vars(knobs)[name] != vars(defaults)[name]:
            raise use_error(
                f"reward.{name}",
                f"a setting with train.stage {stage}",
                "none",
                f"remove it, or set train.stage={reader}",
            )
    if not knobs.step_separator:
        raise use_error("reward.step_separator", "nothing", "a text behind each step", "set it, or remove it")


def _check_preference(stage: str, knobs: PreferenceConfig, loss_type: tuple[str, ...]) -> None:
    allowed = PAIR_LOSS_TYPES[stage]
    unknown = [name for name in loss_type if name not in allowed]
    if unknown or (stage != "dpo" and len(loss_type) > 1):
        number = "names" if stage == "dpo" else "one"
        raise use_error("preference.loss_type", list(loss_type), f"{number} of {', '.join(allowed)}", "correct it")
    if knobs.loss_weights and len(knobs.loss_weights) != len(loss_type):
        raise use_error(
            "preference.loss_weights",
            list(knobs.loss_weights),
            f"one for each loss_type ({len(loss_type)})",
            "give as many, or none",
        )
    if knobs.beta == 0:
        raise use_error("preference.beta", 0, "more than 0", "set it, e.g. to 0.1")
    if knobs.label_smoothing >= 0.5:
        raise use_error("preference.label_smoothing", knobs.label_smoothing, "below 0.5", "set it, e.g. to 0.1")
    if "exo_pair" in loss_type and knobs.label_smoothing == 0:
        raise use_error("preference.label_smoothing", 0, "above 0: exo_pair divides by it", "set it, e.g. to 0.001")
    if knobs.discopop_tau == 0:
        raise use_error("preference.discopop_tau", 0, "more than 0", "set it, e.g. to 0.05")


def _check_reference(recipe: Recipe) -> None:
    stage, reference, key = recipe.train.stage, recipe.preference.reference, "preference.reference"
    if stage not in REFERENCE_STAGES:
        if reference != "cached":
            raise use_error(key, f"{reference} with train.stage {stage}", "nothing: it has no reference", "remove it")
        return
    if reference == "cached" and _augments(recipe):
        raise use_error(
            "data.augment_*",
            f"images that change with train.stage {stage}",
            "none: the reference saw them as they are",
            "remove the augmentations, or train adapters with preference.reference=adapter_off",
        )
    if reference == "adapter_off":
        plan = tuning_plan(recipe)
        whole = [rule.component for rule in plan.rules if rule.tuning.method == "full"]
        if whole or not plan.has_adapters:
            raise use_error(
                key,
                f"adapter_off, and {whole[0]} learns with all its weights" if whole else "adapter_off without adapters",
                "adapters alone, without which the model is what it was",
                "set e.g. peft.tuner_type=lora, or preference.reference=cached",
            )


def _check_contrastive(recipe: Recipe) -> None:
    knobs, stage = recipe.contrastive, recipe.train.stage
    if recipe.train.global_batch_size < 2:
        raise use_error(
            "train.global_batch_size",
            f"{recipe.train.global_batch_size} with train.stage {stage}",
            "at least 2: an image is told from the texts of other rows",
            "set it, e.g. to 256",
        )
    if knobs.temperature and knobs.temperature < LEAST_TEMPERATURE:
        raise use_error(
            "contrastive.temperature", knobs.temperature, f"at least {LEAST_TEMPERATURE}", "set it, e.g. to 0.07"
        )
    if recipe.data.template == "llava_plain":
        raise use_error(
            "data.template",
            f"llava_plain with train.stage {stage}",
            "a template that prints questions: texts are read as such",
            "use another template",
        )
    dropouts = {
        "model.hidden_dropout": recipe.model.hidden_dropout,
        "model.attention_dropout": recipe.model.attention_dropout,
        "peft.lora_dropout": recipe.peft.lora_dropout,
    }
    for name, share in dropouts.items():
        if share:
            raise use_error(
                name,
                f"{share} with train.stage {stage}",
                "0: embeddings are computed twice, and must be the same",
                "set it to 0",
            )


def _check_early_stopping(recipe: Recipe) -> None:
    train = recipe.train
    if not train.early_stopping_patience:
        return
    if not train.eval_steps:  # which needs data.eval
        raise use_error(
            "train.early_stopping_patience",
            f"{train.early_stopping_patience} without train.eval_steps",
            "evaluations during training",
            "set train.eval_steps, or early_stopping_patience to 0",
        )


def _augments(recipe: Recipe) -> bool:
    data = recipe.data
    return data.augment_crop_min_area < 1 or data.augment_color_jitter > 0 or data.augment_flip_probability > 0

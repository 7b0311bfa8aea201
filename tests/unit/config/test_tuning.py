"""What is tuned, and how: the notation of components, and what it means for a layer."""

import dataclasses
from typing import Any

import pytest

from megavlm.config.load import recipe_from_dict
from megavlm.config.peft import PeftConfig
from megavlm.config.precision import Fp8Config
from megavlm.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, Recipe
from megavlm.config.tuning import Tuning, check_tuning, describe_tuning, tuning_plan
from megavlm.errors import UseError

MIXED = "vision: frozen, projector: full, language[0:16]: lora r=8 alpha=16, language[16:32]: lora"


def recipe_of(optimizer: dict[str, Any] | None = None, **peft: Any) -> Recipe:
    return Recipe(optimizer=OptimizerConfig(**optimizer or {}), peft=PeftConfig(**peft))


def test_by_default_everything_learns_whole() -> None:
    plan = tuning_plan(recipe_of())
    assert plan.of("language", 3) == plan.of("vision", None) == Tuning("full")
    assert not plan.has_adapters


def test_a_tuner_takes_what_is_not_frozen() -> None:
    plan = tuning_plan(recipe_of({"freeze_vit": True}, tuner_type="lora", lora_rank=4, lora_alpha=2.0))
    assert plan.of("vision", 0) == Tuning("frozen")
    assert plan.of("projector", None) == plan.of("language", 7) == Tuning("lora", 4, 2.0)
    assert [name for name in ("vision", "projector", "language") if plan.learns(name)] == ["projector", "language"]


def test_components_by_layer_ranges() -> None:
    plan = tuning_plan(recipe_of(components=MIXED, lora_rank=2, lora_alpha=4.0))
    assert plan.of("language", 15) == Tuning("lora", 8, 16.0)
    assert plan.of("language", 16) == Tuning("lora", 2, 4.0)
    assert plan.of("language", 32) == plan.of("language", None) == plan.of("vision", 3) == Tuning("frozen")
    assert plan.of("projector", None) == Tuning("full")


def test_the_last_entry_that_names_a_layer_counts() -> None:
    plan = tuning_plan(recipe_of(components="language: full, language[2:]: lora, language[:1]: frozen"))
    methods = [plan.of("language", layer).method for layer in (0, 1, 2, 9)]
    assert methods == ["frozen", "full", "lora", "lora"]
    assert plan.of("language", None).method == "full"
    # what is not named goes by the rest of the recipe
    assert plan.of("vision", 0).method == "full"


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ("language", "something else"),
        ("tower: lora", "component tower"),
        ("language: magic", "method magic"),
        ("language: lora depth=3", "knob depth"),
        ("language: full r=3", "knob r"),
        ("language: adapter r=3", "knob r"),
        ("language: prefix tokens=0", "at least 1"),
        ("language[4:2]: lora", "layers 4 to 2"),
        ("projector[0:2]: lora", "a range of layers of the projector"),
        ("language: lora r=0", "at least 1"),
        ("language: lora r=1.5", "a whole number"),
        ("language: lora r=1.2.3", "a number"),
    ],
)
def test_mistakes_in_components(components: str, message: str) -> None:
    with pytest.raises(UseError, match=message):
        tuning_plan(recipe_of(components=components))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (recipe_of(components="language: frozen, vision: frozen, projector: frozen"), "all frozen"),
        (recipe_of({"freeze_llm": True}, components="language: lora"), "optimizer.freeze_llm: got true with"),
        (recipe_of({"vit_lr": 1e-4}, components="vision: frozen"), "optimizer.vit_lr"),
        (recipe_of(use_dora=True), "peft.use_dora: got True; expected lora"),
        (recipe_of(bnb_4bit_quant_type="nf4"), "nothing in language is frozen"),
        (recipe_of(tuner_type="lora", bnb_4bit_quant_type="nf4", quantized_components=("llm",)), "got `llm`"),
        (
            dataclasses.replace(recipe_of(tuner_type="prefix"), model=ModelConfig(backend="te")),
            "model.backend: got te with peft prefix",
        ),
        (
            dataclasses.replace(
                recipe_of(tuner_type="lora", bnb_4bit_quant_type="nf4"), model=ModelConfig(backend="te")
            ),
            "peft.bnb_4bit_quant_type: got nf4 with model.backend te",
        ),
        (
            dataclasses.replace(
                recipe_of(tuner_type="lora"),
                model=ModelConfig(backend="te"),
                fp8=Fp8Config(fp8_param_gather=True),
            ),
            "fp8.fp8_param_gather: got true with peft",
        ),
        (
            dataclasses.replace(
                recipe_of(tuner_type="prefix"),
                parallel=ParallelConfig(context_parallel_size=2, cp_comm_type="p2p"),
            ),
            "parallel.cp_comm_type: got p2p with peft prefix",
        ),
        (recipe_of(tuner_type="cross_modal_adapter"), "peft: got vision: cross_modal_adapter; expected language"),
        (recipe_of(tuner_type="lora", target_modules=()), "peft.target_modules: got nothing"),
        (
            dataclasses.replace(
                recipe_of(tuner_type="lora", lora_dropout=0.1), parallel=ParallelConfig(context_parallel_size=2)
            ),
            "peft.lora_dropout: got 0.1 with context_parallel_size 2",
        ),
    ],
)
def test_contradictions(recipe: Recipe, message: str) -> None:
    with pytest.raises(UseError, match=message):
        check_tuning(recipe)


def test_a_checkpoint_can_tell_what_was_tuned() -> None:
    recipe = recipe_of({"lr": 3e-4}, components=MIXED, lora_rank=3)
    assert tuning_plan(recipe_from_dict(describe_tuning(recipe))) == tuning_plan(recipe)
    assert describe_tuning(recipe_of({"freeze_vit": True})) == {}

"""The notation of optimizer.unfreeze, and mistakes in knobs of what learns when and how fast."""

import pytest

from megavlm.config.facts import ModelFacts
from megavlm.config.fit import validate_model
from megavlm.config.learning import Selection, UnfreezeEntry, parse_unfreeze, unfrozen_by
from megavlm.config.load import recipe_from_dict
from megavlm.config.validate import validate_recipe
from megavlm.errors import UseError


def make_recipe(peft=None, train_iters=100, **optimizer):
    train = {"train_iters": train_iters, "precision": "fp32"}
    data = {"train": ["rows.jsonl"]}
    return recipe_from_dict(
        {"model": {"hf_dir": "m"}, "data": data, "train": train, "optimizer": optimizer, "peft": peft or {}}
    )


def test_notation():
    assert parse_unfreeze("  ") == ()
    entries = parse_unfreeze("0: projector ; .1:vision[-2:], language[ 0 : 3 ]; 250: vision; 0.5: language[:]")
    assert entries == (
        UnfreezeEntry(0, (Selection("projector"),)),
        UnfreezeEntry(0.1, (Selection("vision", -2), Selection("language", 0, 3))),
        UnfreezeEntry(250, (Selection("vision"),)),
        UnfreezeEntry(0.5, (Selection("language", 0),)),
    )
    assert [entry.first_step(10) for entry in entries] == [0, 1, 250, 5]
    # shares are rounded down, but 0.29 x 100 is 29
    assert UnfreezeEntry(0.29, ()).first_step(100) == 29 and UnfreezeEntry(0.299, ()).first_step(100) == 29


def test_layers_of_a_range():
    one = Selection("vision", -2)
    assert [layer for layer in range(5) if one.holds("vision", layer, 5)] == [3, 4]
    assert not one.holds("vision", None, 5) and not one.holds("language", 4, 5)
    assert Selection("vision").holds("vision", None, 5) and Selection("vision").holds("vision", 0, 5)
    assert [str(Selection("vision", *bounds)) for bounds in [(), (-2,), (None, 3), (1, 3)]] == [
        "vision",
        "vision[-2:]",
        "vision[:3]",
        "vision[1:3]",
    ]


def test_what_has_begun():
    recipe = make_recipe(unfreeze="0: projector; 0.1: vision[-2:]; 30: vision; 0.5: language")
    assert unfrozen_by(recipe, 100, 10) == []
    assert unfrozen_by(recipe, 100, 31) == [[10, "vision[-2:]"], [30, "vision"]]


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ({"unfreeze": "vision"}, ["optimizer.unfreeze `vision`", "point: component"]),
        ({"unfreeze": "1.5: vision"}, ["share 1.5 of the run", "below 1"]),
        ({"unfreeze": "0: tower"}, ["`tower`", "vision, projector, language"]),
        ({"unfreeze": "0: projector[1:]"}, ["a range of layers of the projector"]),
        ({"unfreeze": "0: projector, vision"}, ["no point from which all of `language` learns"]),
        ({"unfreeze": "0: projector, language; 0.5: vision[-2:]"}, ["all of `vision`", "freeze_vit"]),
        ({"unfreeze": "5: projector, vision, language"}, ["nothing before 5"]),
        ({"unfreeze": "0: projector, vision; 100: language"}, ["step 100 in a run of 100", "raise train.train_iters"]),
        ({"unfreeze": "0: projector, vision, language", "freeze_vit": True}, ["`vision`, which never learns"]),
        ({"unfreeze_warmup_iters": 5}, ["optimizer.unfreeze_warmup_iters", "without optimizer.unfreeze"]),
        ({"vit_layer_decay": 0.0}, ["optimizer.vit_layer_decay", "above 0 and at most 1"]),
        ({"llm_layer_decay": 1.1}, ["optimizer.llm_layer_decay", "above 0 and at most 1"]),
        ({"llm_layer_decay": 0.9, "freeze_llm": True}, ["optimizer.llm_layer_decay", "freeze_llm true"]),
        ({"vit_clip_grad": 0.5}, ["optimizer.vit_clip_grad", "clip_grad_by total"]),
        (
            {"vit_clip_grad": 0.5, "clip_grad_by": "layer", "freeze_vit": True},
            ["optimizer.vit_clip_grad", "freeze_vit true"],
        ),
        ({"aligner_clip_grad": float("nan"), "clip_grad_by": "layer"}, ["optimizer.aligner_clip_grad", "finite"]),
    ],
)
def test_mistakes(optimizer, words):
    with pytest.raises(UseError) as caught:
        validate_recipe(make_recipe(**optimizer), check_paths=False)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_peft_decides_what_has_to_be_unfrozen():
    lora = {"components": "vision: frozen, projector: full, language: lora"}
    validate_recipe(make_recipe(peft=lora, unfreeze="0: projector; 0.3: language"), check_paths=False)


@pytest.mark.parametrize(("layers", "is_there"), [("[-2:]", True), ("[2:4]", True), ("[-5:]", False), ("[3:2]", False)])
def test_layers_are_those_of_the_model(layers, is_there):
    recipe = make_recipe(unfreeze=f"0: projector; 0.1: vision{layers}; 0.3: vision; 0.5: language")
    facts = ModelFacts(8, 4, 2, 16, 64, 4, 4, 64, 512, 4096)
    if is_there:
        validate_model(recipe, facts)
        return
    with pytest.raises(UseError, match=r"`vision\[.*some of the 4 layers of `vision`"):
        validate_model(recipe, facts)

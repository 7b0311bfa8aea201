"""Mistakes in model.rope_scaling, and what it makes of a config.json in either spelling."""

import json

import pytest

from megavlm.config.load import recipe_from_dict
from megavlm.config.rope import check_rope
from megavlm.errors import UseError
from megavlm.models.architecture import LanguageArchitecture, RopeScaling
from megavlm.models.rope_config import rope_changes, with_text

LANGUAGE = LanguageArchitecture(2, 64, 128, 4, 2, 16, 1e-6, 100, 2048, 1e4, False)


def model_of(**knobs):
    return recipe_from_dict({"model": {"hf_dir": "m", **knobs}}).model


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"factor": 4.0}, ["factor", "rope_type ``", "linear or llama3 or yarn or dynamic"]),
        ({"rope_type": "yarn"}, ["factor", "more than 1"]),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 8.0}, ["beta_fast", "rope_type yarn"]),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0, "beta_slow": 2.0}, ["beta_slow", "below beta_fast"]),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 5.0}, ["low_freq_factor", "below high_freq_factor"]),
        ({"rope_type": "yarn", "factor": float("inf")}, ["factor", "finite"]),
        (
            {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64},
            ["original_max_position_embeddings", "yarn"],
        ),
    ],
)
def test_mistakes(knobs, words):
    with pytest.raises(UseError) as caught:
        check_rope(model_of(rope_scaling=knobs).rope_scaling)
    text = str(caught.value)
    assert "\n" not in text and "model.rope_scaling." in text and all(word in text for word in words), text


def test_no_knob_changes_nothing():
    for config in ({"text_config": {"rope_theta": 1.0}}, {"rope_theta": 1.0}):
        assert rope_changes(config, LANGUAGE, model_of()) == {}
        assert with_text(config, {}) == config


def test_the_hubs_spelling_stays():
    """Qwen2.5-VL's: keys at the top, a kind called `type`, and sections that must not get lost."""
    config = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "vision_config": {}}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    changed = with_text(config, rope_changes(config, LANGUAGE, model_of(rope_scaling=yarn, rope_theta=5e6)))
    assert changed == {
        "rope_theta": 5e6,
        "rope_scaling": {"mrope_section": [2, 3, 3], "beta_fast": 32.0, "beta_slow": 1.0, **yarn},
        "max_position_embeddings": 2048,
        "vision_config": {},
    }
    json.dumps(changed)


def test_transformers_spelling_stays():
    config = {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_interleaved": True}}
    }
    linear = model_of(rope_scaling={"rope_type": "linear", "factor": 3.0}, max_position_embeddings=4000)
    changed = with_text(config, rope_changes(config, LANGUAGE, linear))["text_config"]
    assert changed["rope_parameters"] == {
        "rope_type": "linear",
        "rope_theta": 1e6,
        "mrope_interleaved": True,
        "factor": 3.0,
    }
    assert changed["max_position_embeddings"] == 4000 and "rope_scaling" not in changed


def test_a_second_stage_stretches_the_first_context():
    """The original context is that of pretraining, not that of an earlier stretching."""
    language = LanguageArchitecture(
        2, 64, 128, 4, 2, 16, 1e-6, 100, 4096, 1e4, False, rope_scaling=RopeScaling("yarn", 2.0, 1.0, 32.0, 2048, 1.1)
    )
    text = {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}}
    changes = rope_changes(text, language, model_of(rope_scaling={"rope_type": "yarn", "factor": 8.0}))
    assert changes["rope_scaling"]["original_max_position_embeddings"] == 2048
    assert changes["max_position_embeddings"] == 16384


def test_checkpoints_from_before_there_was_yarn_are_read():
    """They are compared by this text."""
    assert repr(RopeScaling("llama3", 8.0, 1.0, 4.0, 512)) == (
        "RopeScaling(kind='llama3', factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, "
        "original_max_positions=512)"
    )
    assert "truncate=False" in repr(RopeScaling("yarn", 8.0, 1.0, 4.0, 512, truncate=False))

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen3VLConfig

from megavlm.config.facts import ModelFacts, read_model_facts
from megavlm.errors import UseError


def write(folder: Path, config: object) -> Path:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def by_transformers(config: Any) -> ModelFacts:
    """The same facts, read by transformers with its own defaults."""
    text, vision = config.text_config, config.vision_config
    is_qwen = config.model_type == "qwen3_vl"
    return ModelFacts(
        num_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        head_dim=text.head_dim,
        ffn_hidden_size=text.intermediate_size,
        vision_num_layers=vision.depth if is_qwen else vision.num_hidden_layers,
        vision_num_attention_heads=vision.num_heads if is_qwen else vision.num_attention_heads,
        vision_ffn_hidden_size=vision.intermediate_size,
        vocab_size=text.vocab_size,
        max_positions=text.max_position_embeddings,
    )


TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def test_tiny_qwen3_vl(tmp_path: Path) -> None:
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    Qwen3VLConfig(text_config={**TEXT, "head_dim": 32}, vision_config=vision).save_pretrained(tmp_path)
    assert read_model_facts(tmp_path) == ModelFacts(
        num_layers=4,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=32,
        ffn_hidden_size=128,
        vision_num_layers=3,
        vision_num_attention_heads=2,
        vision_ffn_hidden_size=48,
        vocab_size=512,
        max_positions=256,
    )


def test_tiny_llava(tmp_path: Path) -> None:
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    config = LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision)
    config.save_pretrained(tmp_path)
    facts = read_model_facts(tmp_path)
    assert facts == by_transformers(config)
    assert (facts.head_dim, facts.num_query_groups, facts.vision_num_layers) == (16, 2, 3)


@pytest.mark.parametrize("config_class", [Qwen3VLConfig, LlavaConfig])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"text_config": {}, "vision_config": {}},
        {"text_config": None, "vision_config": None},
        {"text_config": {"num_attention_heads": 8, "hidden_size": 512, "num_key_value_heads": None}},
        {"text_config": {"num_attention_heads": 8, "hidden_size": 512}, "vision_config": {"hidden_size": 96}},
        {"text_config": TEXT},
    ],
)
def test_absent_keys_have_the_defaults_of_transformers(tmp_path: Path, config_class: Any, config: dict) -> None:
    write(tmp_path, {"model_type": config_class.model_type, **config})
    assert read_model_facts(tmp_path) == by_transformers(config_class.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"model_type": "gpt2"}, "'gpt2'; expected one of qwen3_vl, llava"),
        ({}, "None; expected one of qwen3_vl, llava"),
        ({"model_type": ["llava"]}, "expected one of qwen3_vl, llava"),
        ("{not json", "no JSON"),
        ("[1]", "a list"),
        ({"model_type": "qwen3_vl", "text_config": 3}, "text_config"),
        ({"model_type": "qwen3_vl", "text_config": {"vocab_size": "9"}}, "text_config.vocab_size: got '9'"),
        ({"model_type": "qwen3_vl", "vision_config": {"depth": 0}}, "vision_config.depth: got 0"),
        ({"model_type": "qwen3_vl", "vision_config": {"depth": None}}, "vision_config.depth: got None"),
        ({"model_type": "llava", "text_config": {"model_type": "mistral"}}, "text_config.model_type: got 'mistral'"),
        ({"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}}, "expected clip_vision_model"),
    ],
)
def test_wrong_config(tmp_path: Path, config: object, part: str) -> None:
    with pytest.raises(UseError) as caught:
        read_model_facts(write(tmp_path, config))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_directory_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(UseError, match="no such directory"):
        read_model_facts("Qwen/Qwen3-VL-4B-Instruct")
    with pytest.raises(UseError, match="without config.json"):
        read_model_facts(tmp_path)

"""What layout checks are told of a model, against the config that transformers reads."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tests.pool import PoolKeeper
from tests.tiny import write_tiny_llava, write_tiny_qwen3vl, write_tiny_qwen3vl_moe
from tests.tiny_anyres import write_tiny_llava_next, write_tiny_llava_onevision
from tests.tiny_internvl import write_tiny_internvl, write_tiny_internvl_6b
from tests.tiny_qwen2_5_vl import write_tiny_qwen2_5_vl

WRITERS = {
    "qwen3_vl": write_tiny_qwen3vl,
    "qwen3_vl_moe": write_tiny_qwen3vl_moe,
    "llava": write_tiny_llava,
    "llava_next": write_tiny_llava_next,
    "llava_onevision": write_tiny_llava_onevision,
    "qwen2_5_vl": write_tiny_qwen2_5_vl,
    "internvl": write_tiny_internvl,
    "internvl_6b": write_tiny_internvl_6b,
}


def read_facts(hf_dir: str) -> dict[str, int] | str:
    """On a worker: the facts, or the error."""
    from megavlm.checkpoint.hf_io import read_architecture
    from megavlm.errors import UseError
    from megavlm.models.facts import facts_of

    try:
        return dict(vars(facts_of(read_architecture(Path(hf_dir)))))
    except UseError as error:
        return str(error)


def by_transformers(hf_dir: Path) -> dict[str, Any]:
    """The same, in transformers' words."""
    config = AutoConfig.from_pretrained(hf_dir)
    text, vision = config.text_config, config.vision_config.to_dict()
    layers = vision.get("depth") or vision["num_hidden_layers"]
    if config.model_type in ("llava", "llava_next"):
        layers += 1 + config.vision_feature_layer
    return {
        "num_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_query_groups": text.num_key_value_heads,
        "head_dim": text.to_dict().get("head_dim") or text.hidden_size // text.num_attention_heads,
        "ffn_hidden_size": text.intermediate_size,
        "vision_num_layers": layers,
        "vision_num_attention_heads": vision.get("num_heads") or vision["num_attention_heads"],
        "vision_ffn_hidden_size": vision["intermediate_size"],
        "vocab_size": text.vocab_size,
        "max_positions": text.max_position_embeddings,
        "num_experts": text.num_experts if config.model_type == "qwen3_vl_moe" else 0,
        "expert_ffn_hidden_size": text.moe_intermediate_size if config.model_type == "qwen3_vl_moe" else 0,
    }


@pytest.mark.parametrize("family", WRITERS)
def test_facts(workers: PoolKeeper, tmp_path: Path, family: str) -> None:
    hf_dir = WRITERS[family](tmp_path / family)
    (found,) = workers(1).run(read_facts, hf_dir=str(hf_dir))
    expected = by_transformers(hf_dir)
    assert isinstance(found, dict), found
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ('{"model_type": "gpt2"}', ["'gpt2'; expected one of", "qwen3_vl", "llava"]),
        ("{}", ["model_type: got ''"]),
        ("{not json", ["broken JSON"]),
        ("[1]", ["got list"]),
        ('{"model_type": "qwen3_vl"}', ["no key 'text_config'"]),
        ('{"model_type": "qwen3_vl", "text_config": 3, "vision_config": {}}', ["makes no model"]),
        ('{"model_type": "internvl", "text_config": {}, "vision_config": {"patch_size": "x"}}', ["config.json"]),
    ],
)
def test_wrong_config(workers: PoolKeeper, tmp_path: Path, config: str, parts: list[str]) -> None:
    (tmp_path / "config.json").write_text(config)
    (said,) = workers(1).run(read_facts, hf_dir=str(tmp_path))
    assert isinstance(said, str) and "\n" not in said
    for part in parts:
        assert part in said


@pytest.mark.parametrize("value", [0, -1, "9", None, 2.5])
def test_a_size_that_is_none(workers: PoolKeeper, tmp_path: Path, value: object) -> None:
    hf_dir = write_tiny_qwen3vl(tmp_path / "model")
    config = json.loads((hf_dir / "config.json").read_text())
    config["text_config"]["vocab_size"] = value
    (hf_dir / "config.json").write_text(json.dumps(config))
    (said,) = workers(1).run(read_facts, hf_dir=str(hf_dir))
    assert isinstance(said, str) and "vocab_size" in said and repr(value) in said

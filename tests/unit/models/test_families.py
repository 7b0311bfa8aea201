"""What a family refuses to read; what it reads is shown by the parity tests."""

from typing import Any

import pytest

from tests.pool import PoolKeeper


def read_changed(family: str, changes: dict[str, Any]) -> str:
    """Read a tiny config with changes, on a worker; returns the error."""
    import json
    import tempfile
    from pathlib import Path

    from megavlm.errors import UseError
    from megavlm.models.registry import FAMILIES
    from tests.tiny import write_tiny_llava, write_tiny_qwen3vl, write_tiny_qwen3vl_moe

    write = {
        "qwen3_vl": write_tiny_qwen3vl,
        "qwen3_vl_moe": write_tiny_qwen3vl_moe,
        "llava": write_tiny_llava,
    }[family]
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((write(Path(folder) / "model") / "config.json").read_text())
    for dotted, value in changes.items():
        section: Any = config
        *path, key = dotted.split(".")
        for part in path:
            section = section[part]
        section[key] = value
    try:
        FAMILIES[family].read_config(config)
    except UseError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "qwen3_vl",
            {"text_config.num_hidden_layers": 2},
            "deepstack_visual_indexes: got 3 layers; expected at most 2",
        ),
        (
            "qwen3_vl",
            {"text_config.rope_parameters": {"rope_type": "longrope"}},
            "rope_type: got longrope; expected default, linear, llama3, yarn or dynamic",
        ),
        ("llava", {"vision_feature_layer": [-2, -5]}, "vision_feature_layer: got [-2, -5]; expected a number"),
        ("llava", {"vision_feature_select_strategy": "full"}, "got full; expected default"),
        ("llava", {"text_config.model_type": "gpt2"}, "model_type: got 'gpt2'; expected one of llama, mistral"),
        ("llava", {"text_config.attention_bias": True}, "text_config attention_bias: got True; expected False"),
        ("llava", {"vision_feature_layer": -1}, ""),
        ("llava", {}, ""),
        ("qwen3_vl", {}, ""),
        ("qwen3_vl_moe", {}, ""),
        ("qwen3_vl_moe", {"text_config.mlp_only_layers": [1]}, "expected experts in every layer"),
        ("qwen3_vl_moe", {"text_config.decoder_sparse_step": 2}, "expected experts in every layer"),
        ("qwen3_vl_moe", {"text_config.num_experts_per_tok": 1}, "num_experts_per_tok: got 1; expected 2 to"),
        ("qwen3_vl_moe", {"text_config.num_experts_per_tok": 5}, "num_experts_per_tok: got 5; expected 2 to"),
        ("qwen3_vl_moe", {"text_config.moe_intermediate_size": 32}, "moe_intermediate_size: got 32; expected other"),
    ],
)
def test_configs(workers: PoolKeeper, family: str, changes: dict[str, Any], message: str) -> None:
    (said,) = workers(1).run(read_changed, family=family, changes=changes)
    assert message in said and bool(message) == bool(said)

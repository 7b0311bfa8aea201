"""Qwen3-VL with a mixture of experts in every layer of the language model; the rest is Qwen3-VL.

Source: Qwen3-VL technical report (arXiv 2511.21631); layouts checked against transformers' qwen3_vl_moe.
"""

import dataclasses
from typing import Any

from megavlm.errors import use_error
from megavlm.models.architecture import Architecture, ExpertsArchitecture
from megavlm.models.families import qwen3_vl
from megavlm.models.family import ModelFamily
from megavlm.models.weight_map import Entry, direct, transposed_experts

MODEL_TYPE = "qwen3_vl_moe"


def read_config(config: dict[str, Any]) -> Architecture:
    """Read config.json.

    Raises:
        UseError: layers with a dense MLP, one expert a token, or experts whose two layouts look alike.
    """
    text = config["text_config"]
    dense = qwen3_vl.read_config(config)
    where = "config.json text_config"
    if text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1:
        got = f"mlp_only_layers {text.get('mlp_only_layers')}, decoder_sparse_step {text.get('decoder_sparse_step', 1)}"
        raise use_error(where, got, "experts in every layer", "only that is supported")
    experts = ExpertsArchitecture(
        # transformers 5 writes its own word, the hub has the first
        num_experts=text["num_local_experts"] if "num_local_experts" in text else text["num_experts"],
        top_k=text["num_experts_per_tok"],
        ffn_hidden_size=text["moe_intermediate_size"],
    )
    if not 1 < experts.top_k <= experts.num_experts:
        raise use_error(
            f"{where} num_experts_per_tok", experts.top_k, f"2 to num_experts {experts.num_experts}", "restore the file"
        )
    hidden = dense.language.hidden_size
    if hidden in (experts.ffn_hidden_size, 2 * experts.ffn_hidden_size):
        raise use_error(
            f"{where} moe_intermediate_size",
            experts.ffn_hidden_size,
            f"other than hidden_size {hidden} and half of it: the two layouts of expert weights are told apart by it",
            "such a model cannot be read",
        )
    language = dataclasses.replace(dense.language, experts=experts)
    return dataclasses.replace(dense, family=MODEL_TYPE, language=language)


def weight_map(architecture: Architecture) -> list[Entry]:
    """Native names to the names in a Qwen3-VL-MoE checkpoint."""
    language = architecture.language
    experts = language.experts
    assert experts is not None

    def mixture(ours: str, theirs: str) -> list[Entry]:
        stack = f"{ours}mlp.experts.experts."
        hidden, inner = language.hidden_size, experts.ffn_hidden_size
        return [
            direct(f"{ours}mlp.router.weight", f"{theirs}mlp.gate.weight"),
            transposed_experts(f"{stack}linear_fc1.weight", f"{theirs}mlp.experts.gate_up_proj", hidden, True),
            transposed_experts(f"{stack}linear_fc2.weight", f"{theirs}mlp.experts.down_proj", inner, False),
        ]

    return qwen3_vl.map_with(architecture, mixture)


FAMILY = ModelFamily(
    model_type=MODEL_TYPE,
    read_config=read_config,
    build_tower=qwen3_vl.build_tower,
    build_projector=qwen3_vl.build_projector,
    weight_map=weight_map,
    public_name=lambda name: name,
    memory_name=lambda name: name,
)

"""The formulas against torch's own count of what transformers' models execute."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from megavlm.models.architecture import Architecture, ConnectorArchitecture
from megavlm.planner.flops import connector_flops, image_flops, language_flops
from tests.parity.composed import COMPOSED, CONNECTORS, ComposedReference
from tests.tiny import write_tiny_llava, write_tiny_qwen3vl, write_tiny_qwen3vl_moe
from tests.tiny_qwen2_5_vl import write_tiny_qwen2_5_vl
from tests.unit.planner.reading import read_architecture


def _counted(call):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 4, 6), (1, 8, 4)])
def test_qwen3_vl_image(tmp_path, grid):
    hf_dir = write_tiny_qwen3vl(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(hf_dir, attn_implementation="eager")
    architecture: Architecture = read_architecture(hf_dir)
    patches = torch.randn(grid[1] * grid[2], architecture.vision.patch_channels)
    grid_thw = torch.tensor([grid])
    # the model embeds patches by a convolution, which is counted alike
    assert _counted(lambda: model.model.visual(patches, grid_thw)) == image_flops(architecture, grid)


def test_llava_image(tmp_path):
    hf_dir = write_tiny_llava(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(hf_dir, attn_implementation="eager")
    architecture = read_architecture(hf_dir)
    pixels = torch.randn(1, 3, 28, 28)
    counted = _counted(lambda: model.model.get_image_features(pixels))
    # transformers runs CLIP's last layer too, whose output LLaVA never uses
    vision = architecture.vision
    tokens = vision.num_positions + 1
    unused = 2 * tokens * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.ffn_hidden_size)
    unused += 4 * tokens**2 * vision.hidden_size
    assert counted - unused == image_flops(architecture, (1, 4, 4))


@pytest.mark.parametrize("length", [1, 7, 64])
def test_language(tmp_path, length):
    hf_dir = write_tiny_qwen3vl(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(hf_dir, attn_implementation="eager")
    architecture = read_architecture(hf_dir)
    tokens = torch.arange(20, 20 + length)[None]
    kinds = torch.zeros(1, length, dtype=torch.int)
    counted = _counted(lambda: model(input_ids=tokens, mm_token_type_ids=kinds))
    assert counted == language_flops(architecture, [length])


@pytest.mark.parametrize("length", [1, 7, 64])
def test_language_with_experts(tmp_path, length):
    hf_dir = write_tiny_qwen3vl_moe(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(
        hf_dir, attn_implementation="eager", experts_implementation="eager"
    )
    architecture = read_architecture(hf_dir)
    tokens = torch.arange(20, 20 + length)[None]
    kinds = torch.zeros(1, length, dtype=torch.int)
    counted = _counted(lambda: model(input_ids=tokens, mm_token_type_ids=kinds))
    assert counted == language_flops(architecture, [length])


def test_a_packed_row_is_its_samples(tmp_path):
    architecture = read_architecture(write_tiny_qwen3vl(tmp_path / "model"))
    together = language_flops(architecture, [5, 9, 2])
    assert together == sum(language_flops(architecture, [length]) for length in (5, 9, 2))
    assert language_flops(architecture, [16]) > together


@pytest.mark.parametrize("kind", COMPOSED)
def test_composed_image(tmp_path, kind):
    model = ComposedReference(kind).requires_grad_(False)
    keys = CONNECTORS[kind]
    connector = ConnectorArchitecture(
        kind=kind,
        num_queries=keys.get("num_queries", 0),
        depth=keys.get("num_hidden_layers", 0),
        hidden_size=keys.get("hidden_size", 0),
        ffn_hidden_size=keys.get("intermediate_size", 0),
        num_heads=keys.get("num_attention_heads", 0),
        num_key_value_heads=keys.get("num_key_value_heads", 0),
        head_dim=keys.get("head_dim", 0),
        cross_attention_frequency=keys.get("cross_attention_frequency", 1),
        merge_size=keys.get("scale_factor", 1),
    )
    plain = read_architecture(write_tiny_llava(tmp_path / "model"))  # the same tower
    architecture = dataclasses.replace(plain, connector=connector)
    pixels = torch.randn(1, 3, 28, 28)
    tower = _counted(lambda: model.vision_tower(pixels))
    counted = _counted(lambda: model.get_image_features(pixels)) - tower
    assert counted == connector_flops(architecture, (1, 4, 4)) > 0


@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 6, 10), (1, 2, 20)])
def test_qwen2_5_vl_image(tmp_path, grid):
    hf_dir = write_tiny_qwen2_5_vl(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(hf_dir, attn_implementation="eager")
    architecture = read_architecture(hf_dir)
    patches = torch.randn(grid[1] * grid[2], architecture.vision.patch_channels)
    assert _counted(lambda: model.model.visual(patches, torch.tensor([grid]))) == image_flops(architecture, grid)

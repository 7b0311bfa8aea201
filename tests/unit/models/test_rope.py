import math

import pytest
import torch
from transformers import LlamaConfig, Qwen3VLConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding, Qwen3VLVisionRotaryEmbedding

from megavlm.models.architecture import RopeScaling
from megavlm.models.rope import RotaryAngles, axial_angles
from megavlm.models.text_config import rope_scaling

CPU = torch.device("cpu")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
SECTIONS = [(16, (3, 3, 2)), (128, (24, 20, 20))]


def text_config(head_dim, section, base):
    rope = {"rope_type": "default", "rope_theta": base, "mrope_section": list(section), "mrope_interleaved": True}
    text = {"head_dim": head_dim, "rope_parameters": rope, "hidden_size": 64, "num_attention_heads": 4}
    return Qwen3VLConfig(text_config=text).text_config


def random_positions(num_tokens):
    """Different along the three axes, as inside an image."""
    return torch.randint(0, 3000, (3, 1, num_tokens), generator=torch.Generator().manual_seed(0))


def assert_same_rotation(angles, cos, sin):
    assert angles.dtype == torch.float32
    torch.testing.assert_close(angles.cos(), cos.reshape(angles.shape), rtol=0, atol=1e-6)
    torch.testing.assert_close(angles.sin(), sin.reshape(angles.shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("head_dim", "section"), SECTIONS)
@pytest.mark.parametrize("base", [1e4, 5e6])
def test_interleaved_axes_equal_transformers(head_dim, section, base):
    positions = random_positions(50)
    theirs = Qwen3VLTextRotaryEmbedding(text_config(head_dim, section, base))
    cos, sin = theirs(torch.zeros(1, 50, head_dim), positions)
    angles = RotaryAngles(head_dim, base, section, True, CPU)(positions)
    assert angles.shape == (50, 1, 1, head_dim)
    assert_same_rotation(angles, cos, sin)


@pytest.mark.parametrize(("head_dim", "section"), SECTIONS)
def test_chunked_axes_are_blocks_of_frequencies(head_dim, section):
    positions = random_positions(20)
    angles = RotaryAngles(head_dim, 1e4, section, False, CPU)(positions)[:, 0, 0]
    frequencies = 1e4 ** (-torch.arange(0, head_dim, 2) / head_dim)
    start = 0
    for axis, size in enumerate(section):
        expected = positions[axis, 0, :, None] * frequencies[start : start + size]
        torch.testing.assert_close(angles[:, start : start + size], expected)
        start += size
    torch.testing.assert_close(angles[:, : head_dim // 2], angles[:, head_dim // 2 :])


def test_one_axis_equals_llama():
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, rope_theta=10000.0)
    positions = torch.arange(40)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, 40, 16), positions)
    angles = RotaryAngles(16, 1e4, None, False, CPU)(positions.expand(3, 1, 40))
    assert_same_rotation(angles, cos, sin)


def test_equal_axes_make_the_section_irrelevant():
    positions = torch.arange(30).expand(3, 1, 30)
    plain = RotaryAngles(16, 1e4, None, False, CPU)(positions)
    for interleaved in (True, False):
        assert torch.equal(RotaryAngles(16, 1e4, (3, 3, 2), interleaved, CPU)(positions), plain)


def test_frequencies_stay_exact_in_a_bf16_model_and_are_no_state():
    module = RotaryAngles(16, 1e4, (3, 3, 2), True, CPU).to(torch.bfloat16)
    assert module.inverse_frequencies_F.dtype == torch.float32 and not module.state_dict()


@pytest.mark.parametrize("head_dim", [8, 72])
def test_vision_equals_transformers(head_dim):
    config = Qwen3VLConfig(vision_config={"hidden_size": head_dim * 2, "num_heads": 2}).vision_config
    rows, columns = torch.randint(0, 60, (2, 33), generator=torch.Generator().manual_seed(1))
    cos, sin = Qwen3VLVisionRotaryEmbedding(config)(torch.zeros(33, head_dim), torch.stack((rows, columns), -1))
    angles = axial_angles(rows, columns, head_dim)
    assert angles.shape == (33, 1, 1, head_dim)
    assert_same_rotation(angles, cos, sin)


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"rope_type": "linear", "factor": 4.0}, RopeScaling("linear", 4.0)),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 512},
            RopeScaling("llama3", 8.0, 1.0, 4.0, 512),
        ),
        (YARN, RopeScaling("yarn", 4.0, 1.0, 32.0, 512, 1 + 0.1 * math.log(4))),
        (YARN | {"beta_fast": 8, "beta_slow": 2}, RopeScaling("yarn", 4.0, 2.0, 8.0, 512, 1 + 0.1 * math.log(4))),
        (
            YARN | {"attention_factor": 0.9, "truncate": False},
            RopeScaling("yarn", 4.0, 1.0, 32.0, 512, 0.9, truncate=False),
        ),
        (
            YARN | {"mscale": 2.0, "mscale_all_dim": 0.5},
            RopeScaling("yarn", 4.0, 1.0, 32.0, 512, (1 + 0.2 * math.log(4)) / (1 + 0.05 * math.log(4))),
        ),
        # every frequency is slow: the ramp is a step
        (YARN | {"original_max_position_embeddings": 6}, RopeScaling("yarn", 4.0, 1.0, 32.0, 6, 1 + 0.1 * math.log(4))),
    ],
)
def test_stretched_frequencies_equal_transformers(keys, scaling):
    settings = {"rope_theta": 5e5, **keys}
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, max_position_embeddings=2048, rope_parameters=settings)
    assert rope_scaling(settings, 2048) == scaling
    theirs = LlamaRotaryEmbedding(config)
    assert scaling.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-12)
    ours = RotaryAngles(64, 5e5, None, False, CPU, scaling).inverse_frequencies_F
    torch.testing.assert_close(ours, theirs.inv_freq, rtol=1e-6, atol=0)
    assert not torch.allclose(ours, RotaryAngles(64, 5e5, None, False, CPU).inverse_frequencies_F, rtol=0.1, atol=0)

"""A small model and a workload for the planner's tests."""

import dataclasses

import numpy as np

from megavlm.config.inputs import InputSpec
from megavlm.config.schema import DataConfig, OptimizerConfig, Recipe, TrainConfig
from megavlm.models.architecture import Architecture, ExpertsArchitecture, LanguageArchitecture, VisionArchitecture
from megavlm.planner.hardware import find_hardware
from megavlm.planner.stepcosts import Problem
from megavlm.planner.workload import Sample, typical_batch

ARCHITECTURE = Architecture(
    family="qwen3_vl",
    vision=VisionArchitecture(6, 1024, 4096, 16, "gelu_pytorch_tanh", 1e-6, 1536, 2, 2304, (1, 2)),
    language=LanguageArchitecture(
        num_layers=8,
        hidden_size=2048,
        ffn_hidden_size=6144,
        num_attention_heads=16,
        num_query_groups=4,
        head_dim=128,
        norm_epsilon=1e-6,
        vocab_size=32768,
        max_positions=32768,
        rotary_base=5e6,
        tied_embeddings=False,
        qk_norm=True,
        mrope_section=(24, 20, 20),
        mrope_interleaved=True,
    ),
    inputs=InputSpec(151, 32768, "dynamic", 16, 2, 2, 0, "mrope"),
)

EXPERTS = dataclasses.replace(
    ARCHITECTURE,
    family="qwen3_vl_moe",
    language=dataclasses.replace(ARCHITECTURE.language, experts=ExpertsArchitecture(12, 2, 768)),
)


def make_samples(num_samples: int = 64, seed: int = 0) -> list[Sample]:
    """Rows with none, one or two images of different sizes."""
    random = np.random.default_rng(seed)
    samples = []
    for _ in range(num_samples):
        sides = random.integers(4, 24, size=(int(random.integers(0, 3)), 2)) * 2
        grids = tuple((1, int(rows), int(columns)) for rows, columns in sides)
        visual = sum(rows * columns // 4 for _, rows, columns in grids)
        samples.append(Sample(int(random.integers(20, 400)) + visual, grids))
    return samples


def make_problem(
    num_gpus: int = 4,
    packing: bool = True,
    memory_gb: float = 80.0,
    seed: int = 0,
    freeze_vit: bool = False,
    architecture: Architecture = ARCHITECTURE,
) -> Problem:
    """16 samples a step on H100s."""
    recipe = Recipe(
        data=DataConfig(max_length=2048, packing=packing),
        train=TrainConfig(global_batch_size=16),
        optimizer=OptimizerConfig(freeze_vit=freeze_vit),
    )
    workload = typical_batch(architecture, make_samples(seed=seed), 16, 2048)
    return Problem(workload, recipe, find_hardware("h100", memory_gb), num_gpus)

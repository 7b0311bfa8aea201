"""What the workers run for objectives of SFT: a first step on all rows, and what was in it."""

from pathlib import Path
from typing import Any

from tests.parity.cases import Measured, compare_gradients
from tests.parity.reference import Reference
from tests.parity.rows import Item

# Tasks, each a file of rows beside the model.
TASKS = ("one", "two")


def recipe_of(root: Path, parallel: dict[str, Any], **sft: Any) -> Any:
    """A recipe whose first global batch has every row of both tasks once."""
    from megavlm.config.schema import (
        DataConfig,
        MixtureSource,
        ModelConfig,
        OptimizerConfig,
        ParallelConfig,
        Recipe,
        TrainConfig,
    )
    from megavlm.config.stage_knobs import SftConfig

    sources = tuple(MixtureSource(name, (str(root / f"{name}.jsonl"),), epochs=1.0) for name in TASKS)
    num_rows = sum(len((root / f"{name}.jsonl").read_text().splitlines()) for name in TASKS)
    return Recipe(
        output_dir=str(root / "runs"),
        model=ModelConfig(hf_dir=str(root / "model")),
        parallel=ParallelConfig(use_distributed_optimizer=False, **parallel),
        data=DataConfig(mixture=sources, box_format="bin_tokens_1000"),
        # not clipped: the gradients are looked at after the step
        optimizer=OptimizerConfig(clip_grad=0.0),
        train=TrainConfig(num_train_epochs=1, precision="fp32", global_batch_size=num_rows, micro_batch_size=2),
        sft=SftConfig(**sft),
    )


def items_of_tasks(root: Path) -> list[tuple[Item, int]]:
    """The rows of both tasks as our data room prepares them, with the number of their task."""
    import torch

    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.data.pixels import load_sample_patches
    from megavlm.data.rows import Rows
    from megavlm.train.datasets import build_encoder

    encoder = build_encoder(recipe_of(root, {}), HFDirectory(root / "model"))
    items = []
    for number, name in enumerate(TASKS):
        for sample in Rows.open([str(root / f"{name}.jsonl")]):
            encoded = encoder.encode(sample)
            patches = [torch.zeros(0, encoder.inputs.patch_channels), *load_sample_patches(encoded, encoder)]
            items.append((Item(encoded, torch.cat(patches)), number))
    return items


def step_against(recipe: Any, expected: Reference, weighting: dict[str, Any]) -> tuple[Measured, dict[str, Any]]:
    """A first step from a state of the weights of tasks: distances of loss and gradients; figures, and the state after.

    The figures are those of the step.
    """
    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.config.validate import validate_recipe
    from megavlm.train.state import build_state
    from megavlm.train.step import train_step

    validate_recipe(recipe)
    state = build_state(recipe)
    memory: Any = state.stage.memory
    memory.weighting.restore(weighting)
    result = train_step(state, 0)
    measured = compare_gradients(state.models, expected.gradients, HFDirectory(recipe.model.hf_dir))
    measured["loss"] = abs(result.loss / expected.loss - 1)
    return measured, result.figures | {"state": memory.weighting.state()}

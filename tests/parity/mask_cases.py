"""What the workers run for masks: rows as our data room prepares them, and a training step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.parity.cases import Measured, compare_gradients, recipe_of
from tests.parity.reference import Reference
from tests.parity.rows import Item


def recipe_for(hf_dir: Path, rows_file: Path, knobs: Mapping[str, Any], parallel: Mapping[str, Any], size: int) -> Any:
    """A recipe whose first global batch has all rows in order."""
    from megavlm.config.schema import DataConfig, OptimizerConfig, TrainConfig
    from megavlm.config.stage_knobs import SftConfig

    num_rows = len(rows_file.read_text().splitlines())
    return recipe_of(
        hf_dir,
        parallel,
        data=DataConfig(train=(str(rows_file),), shuffle=False),
        # not clipped: the gradients are looked at after the step
        optimizer=OptimizerConfig(clip_grad=0.0),
        train=TrainConfig(train_iters=1, precision="fp32", global_batch_size=num_rows, micro_batch_size=size),
        sft=SftConfig(**knobs),
    )


def items_of(hf_dir: Path, rows_file: Path, knobs: Mapping[str, Any]) -> list[Item]:
    """The rows of a file."""
    import torch

    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.data.pixels import load_sample_patches
    from megavlm.data.rows import Rows
    from megavlm.train.datasets import build_encoder

    encoder = build_encoder(recipe_for(hf_dir, rows_file, knobs, {}, 1), HFDirectory(hf_dir))
    items = []
    for sample in Rows.open([str(rows_file)]):
        encoded = encoder.encode(sample)
        patches = [torch.zeros(0, encoder.inputs.patch_channels), *load_sample_patches(encoded, encoder)]
        items.append(Item(encoded, torch.cat(patches)))
    return items


def step_against(
    hf_dir: Path,
    rows_file: Path,
    expected: Reference,
    knobs: Mapping[str, Any],
    parallel: Mapping[str, Any],
    micro_batch_size: int,
    broken: bool = False,
) -> tuple[Measured, dict[str, float]]:
    """One step on all rows of a file; ranks that the layout leaves over are data ranks. Distances, and figures.

    `broken`: the query of a mask is that of the token behind its own.
    """
    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.config.validate import validate_recipe
    from megavlm.models.chunk import LanguageChunk
    from megavlm.train.state import build_state
    from megavlm.train.step import train_step

    recipe = recipe_for(hf_dir, rows_file, knobs, parallel, micro_batch_size)
    validate_recipe(recipe)
    mask_tokens = LanguageChunk._mask_tokens

    def shifted(chunk: Any, tokens_T: Any, borders: Any) -> Any:
        visual_V, segments_G = mask_tokens(chunk, tokens_T, borders)
        return visual_V, segments_G + 1

    with patch.object(LanguageChunk, "_mask_tokens", shifted if broken else mask_tokens):
        state = build_state(recipe)
        result = train_step(state, 0)
    head = state.directory.architecture.language.mask_head
    assert head is not None and not state.directory.new_mask_names
    judge = HFDirectory(hf_dir).with_mask_head(head)
    measured = compare_gradients(state.models, expected.gradients, judge)
    return measured | {"loss": abs(result.loss / expected.loss - 1)}, dict(result.figures)

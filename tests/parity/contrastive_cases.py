"""What the workers run: a training step on embeddings of images and texts, and on whether they match."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.parity.cases import Measured, compare_gradients, recipe_of
from tests.parity.reference import Reference


def step_against(
    hf_dir: Path,
    rows_file: Path,
    expected: Reference,
    knobs: Mapping[str, Any],
    micro_batch_size: int,
    parallel: Mapping[str, Any],
    broken: bool = False,
    matching: Mapping[str, Any] | None = None,
) -> Measured:
    """One step on all rows of a file as one global batch; ranks that the layout leaves over are data ranks.

    `broken`: embeddings have no gradient from the rows of others. `matching`: knobs of that stage, which is run then.
    """
    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.config.schema import DataConfig, OptimizerConfig, TrainConfig
    from megavlm.config.stage_knobs import ContrastiveConfig, MatchingConfig
    from megavlm.losses import contrastive
    from megavlm.train.state import build_state
    from megavlm.train.step import train_step

    num_rows = len(rows_file.read_text().splitlines())
    train = TrainConfig(
        stage="contrastive" if matching is None else "matching",
        train_iters=1,
        precision="fp32",
        global_batch_size=num_rows,
        micro_batch_size=micro_batch_size,
    )
    recipe = recipe_of(
        hf_dir,
        parallel,
        data=DataConfig(train=(str(rows_file),), shuffle=False),
        # not clipped: the gradients are looked at after the step
        optimizer=OptimizerConfig(clip_grad=0.0),
        train=train,
        contrastive=ContrastiveConfig(**knobs),
        matching=MatchingConfig(**(matching or {})),
    )
    gather = contrastive._Gather.backward
    lost = staticmethod(lambda _ctx, grad_MD: (torch.zeros_like(grad_MD), None, None))
    with patch.object(contrastive._Gather, "backward", lost if broken else gather):
        state = build_state(recipe)
        result = train_step(state, 0)
    judge = HFDirectory(hf_dir).as_embedding_model(recipe.contrastive.embedding_dim, matching is not None)
    measured = compare_gradients(state.models, expected.gradients, judge)
    return measured | {"loss": abs(result.loss / expected.loss - 1), "accuracy": result.figures.get("accuracy", -1.0)}

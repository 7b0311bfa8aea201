"""What the workers run: cross-modal adapters with given weights.

Imports megatron only inside functions: pytest imports this module too.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.parity.cases import _compare_logits, _forward, recipe_of
from tests.parity.reference import Reference
from tests.parity.rows import Item, pack_items

_NAME = re.compile(r"language\.decoder\.layers\.(\d+)\..*(linear_proj|linear_fc2)\.adapter\.bottleneck\.(.+)")


def compare_adapters(
    hf_dir: Path,
    peft: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    rows: Mapping[str, tuple[Sequence[Item], Reference]],
    parallel: Mapping[str, Any],
    recompute: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Largest difference of logits, and of an adapter's gradient (relative), by row; all forward, then all backward.

    Args:
        hf_dir: the model.
        peft: section of the recipe.
        weights: of the adapters, by `<layer>.<linear>.<parameter>`; gradients of the rows have these names too.
        rows: samples of each packed row, with what transformers and plain torch made of them.
        parallel: layout.
        recompute: what is computed again in the backward pass.
    """
    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.config.numerics import row_multiples
    from megavlm.config.peft import PeftConfig
    from megavlm.models.names import named_parameters
    from megavlm.parallel.groups import initialize
    from megavlm.platform.seeds import seed_everything
    from megavlm.train.parts import build_parts
    from megavlm.train.stages.sft import SupervisedFineTuning

    recipe = recipe_of(hf_dir, {**parallel, **recompute}, peft=PeftConfig(**peft))
    directory = HFDirectory(hf_dir)
    groups = initialize(recipe.parallel)
    seed_everything(recipe.train.seed)
    parts = build_parts(recipe, directory, groups, 0)
    (model,) = parts.models
    learned = {}
    for name, parameter in named_parameters(model):
        if parameter.requires_grad:
            match = _NAME.fullmatch(name)
            assert match is not None, name
            learned[".".join(match.groups())] = parameter
    assert set(learned) == set(weights)
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter.copy_(weights[name])
    stage = SupervisedFineTuning(groups)
    # As in a pipeline: another row has gone through before the gradients of one come back.
    passes = []
    for name, (items, expected) in rows.items():
        batch = pack_items(items, directory.architecture.inputs.patch_channels, *row_multiples(recipe))
        passes.append((name, batch, expected, _forward(parts, batch)))
    measured = {}
    for name, batch, expected, logits_TW in passes:
        for chunk in parts.wrapped:
            chunk.zero_grad_buffer()
        model.show_row(batch.tokens_T, batch.cu_seqlens)
        loss_sum, count, _ = stage.loss(logits_TW, batch)
        loss_sum.backward()
        parts.reduce_gradients()
        parts.scale_gradients(1.0 / count.item())
        differences = {}
        for one, parameter in learned.items():
            theirs = expected.gradients[one]
            if theirs is None or not theirs.any():  # of images, in a row without any
                assert not vars(parameter)["main_grad"].any(), one
            else:
                differences[one] = ((vars(parameter)["main_grad"] - theirs).norm() / theirs.norm()).item()
        worst = max(differences, key=lambda one: differences[one])
        gradients = {"gradients": differences[worst], "worst": worst, "compared": len(differences)}
        measured[name] = _compare_logits(logits_TW.detach(), parts, expected) | gradients
    return measured

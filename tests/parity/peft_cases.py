"""What the workers run: adapters of the peft package in our model, and ours for it.

Imports megatron only inside functions: pytest imports this module too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tests.parity.cases import _compare_logits, _forward, recipe_of
from tests.parity.reference import Reference
from tests.parity.rows import Item, pack_items


def compare_adapter(
    hf_dir: Path,
    peft: Mapping[str, Any],
    rows: Mapping[str, tuple[Sequence[Item], Reference]],
    parallel: Mapping[str, Any],
    broken: str = "",
) -> dict[str, dict[str, Any]]:
    """Largest difference of logits, and of an adapter's gradient (relative), by row.

    Args:
        hf_dir: the model.
        peft: section of the recipe; its `adapters` are what the reference has.
        rows: samples of each packed row, with what transformers and peft made of them.
        parallel: layout.
        broken: what to break on purpose, a key of `MUTATIONS`.
    """
    from megavlm.checkpoint.adapter_import import AdapterFolder
    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.config.peft import PeftConfig
    from megavlm.parallel.groups import initialize
    from megavlm.platform.seeds import seed_everything
    from megavlm.train.parts import build_parts
    from megavlm.train.stages.sft import SupervisedFineTuning
    from megavlm.train.state import row_multiples
    from tests.parity.mutations import mutation

    with mutation(broken):
        recipe = recipe_of(hf_dir, parallel, peft=PeftConfig(**peft))
        directory = HFDirectory(hf_dir)
        groups = initialize(recipe.parallel)
        seed_everything(recipe.train.seed)
        parts = build_parts(recipe, directory, groups, 0)
        stage = SupervisedFineTuning(groups)
        folder = AdapterFolder(Path(recipe.peft.adapters), directory)
        measured = {}
        for name, (items, expected) in rows.items():
            batch = pack_items(items, directory.architecture.inputs.patch_channels, *row_multiples(recipe))
            for chunk in parts.wrapped:
                chunk.zero_grad_buffer()
            logits_TW = _forward(parts, batch)
            loss_sum, count, _ = stage.loss(logits_TW, batch)
            loss_sum.backward()
            parts.reduce_gradients()
            parts.scale_gradients(1.0 / count.item())
            measured[name] = _compare_logits(logits_TW.detach(), parts, expected) | _gradients(parts, folder, expected)
    return measured


# In memory, peft has a module for DoRA's magnitudes.
_SUFFIX = {"lora_magnitude_vector": ".weight"}


def _gradients(parts: Any, folder: Any, expected: Reference) -> dict[str, Any]:
    """|ours - theirs| / |theirs| of the worst matrix, its name, and how many were compared."""
    from megavlm.models.names import stacked_name
    from megavlm.peft.attach import adapted_linears

    worst, worst_name, compared = 0.0, "", set()
    for model in parts.all:
        for name, linear in adapted_linears(model):
            for projection, one in linear.adapter.projections.items():
                for kind, parameter in one.named_parameters():
                    native, expert = stacked_name(f"{name}.adapter.projections.{projection}.{kind}")
                    tensor = folder.tensors[native]
                    theirs = expected.gradients[
                        tensor.key.replace(f".{kind}", f".{kind}.default") + _SUFFIX.get(kind, "")
                    ]
                    if theirs is None:  # of a row without images
                        assert not parameter.main_grad.any(), name
                        continue
                    whole = tensor.to_native(theirs, folder.num_experts)
                    part = linear.adapter.part_of(projection, kind, whole if expert is None else whole[expert])
                    if not part.any():
                        assert not parameter.main_grad.any(), f"{name} has a gradient"
                        continue
                    difference = ((parameter.main_grad - part).norm() / part.norm()).item()
                    compared.add(tensor.key)
                    if not difference <= worst:
                        worst, worst_name = difference, tensor.key
    return {"gradients": worst, "worst": worst_name, "compared": len(compared)}


def train_and_export(
    hf_dir: Path, rows_file: Path, out_dir: Path, peft: Mapping[str, Any], parallel: Mapping[str, Any]
) -> None:
    """Train a few steps with adapters, and save a native checkpoint in out_dir/native/checkpoints."""
    from megavlm.config.peft import PeftConfig
    from megavlm.config.schema import DataConfig, OptimizerConfig, TrainConfig
    from megavlm.train import resume
    from megavlm.train.state import build_state
    from megavlm.train.step import train_step

    recipe = recipe_of(
        hf_dir,
        parallel,
        name="native",
        output_dir=str(out_dir),
        data=DataConfig(train=(str(rows_file),), shuffle=False),
        optimizer=OptimizerConfig(lr=2e-2),
        peft=PeftConfig(**peft),
        train=TrainConfig(train_iters=4, precision="fp32", global_batch_size=4, micro_batch_size=1),
    )
    state = build_state(recipe)
    for step in range(4):
        train_step(state, step)
        state.step += 1
    resume.save(state)


def export(hf_dir: Path, out_dir: Path, merged: bool = True) -> None:
    """Export what `train_and_export` has saved, as an adapter and (where it can be) merged."""
    from megavlm.checkpoint.convert import export_adapter, export_checkpoint
    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.checkpoint.native import find_checkpoint

    folder = find_checkpoint(out_dir / "native" / "checkpoints", required=True)
    assert folder is not None
    export_adapter(folder, HFDirectory(hf_dir), out_dir / "adapter", None)
    if merged:
        export_checkpoint(folder, HFDirectory(hf_dir), out_dir / "merged", "float32")


def logits_of(
    hf_dir: Path, rows: Mapping[str, Sequence[Item]], peft: Mapping[str, Any] = MappingProxyType({}), how: str = ""
) -> dict[str, torch.Tensor]:
    """Our logits, by row; `how`: with adapters `merged`, or `disabled`."""
    import contextlib

    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.config.peft import PeftConfig
    from megavlm.parallel.groups import initialize
    from megavlm.peft.attach import adapters_disabled, lora_merged
    from megavlm.platform.seeds import seed_everything
    from megavlm.train.parts import build_parts

    recipe = recipe_of(hf_dir, {}, peft=PeftConfig(**peft))
    directory = HFDirectory(hf_dir)
    groups = initialize(recipe.parallel)
    seed_everything(recipe.train.seed)
    parts = build_parts(recipe, directory, groups, 0)
    ways: dict[str, Any] = {"merged": lora_merged, "disabled": adapters_disabled}
    found = {}
    with torch.no_grad(), ways[how](parts.all) if how else contextlib.nullcontext():
        for name, items in rows.items():
            found[name] = _forward(parts, pack_items(items, directory.architecture.inputs.patch_channels, 1, 1))
    return found

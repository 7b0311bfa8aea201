"""What the workers run: our model on packed rows, compared with what transformers made of the same samples.

Imports megatron only inside functions: pytest imports this module too.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tests.parity.mutations import mutation
from tests.parity.reference import Reference
from tests.parity.rows import Item, pack_items

# What must hold in fp32: largest difference of logits; relative difference of the loss, of every parameter's gradient
# (by norms), and of vision features (largest difference over largest value). In bf16, BF16_LOGITS.
TOLERANCES = {"logits": 1e-5, "loss": 1e-5, "gradients": 1e-4, "tower": 1e-5, "features": 1e-5, "deepstack": 1e-5}
BF16_LOGITS = 0.05

# Measured figure by name; "worst parameter" is a name.
Measured = dict[str, Any]


def input_spec(hf_dir: Path) -> Any:
    """The family's InputSpec for a directory."""
    from megavlm.checkpoint.hf_io import HFDirectory

    return HFDirectory(hf_dir).architecture.inputs


def memory_names(hf_dir: Path) -> list[str]:
    """What transformers calls every tensor of a directory's weight map, once it is in memory."""
    from megavlm.checkpoint.hf_io import HFDirectory

    directory = HFDirectory(hf_dir)
    return [directory.family.memory_name(name) for entry in directory.entries for name in entry.names]


def encode_rows(hf_dir: Path, rows_file: Path) -> list[Item]:
    """A file's rows as our data room prepares them."""
    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.data.images import read_image_size
    from megavlm.data.pixels import load_sample_patches
    from megavlm.data.rows import Rows
    from megavlm.train.datasets import build_encoder

    encoder = build_encoder(recipe_of(hf_dir, {}), HFDirectory(hf_dir))
    items = []
    for sample in Rows.open([str(rows_file)]):
        encoded = encoder.encode(sample)
        patches = [torch.zeros(0, encoder.inputs.patch_channels), *load_sample_patches(encoded, encoder)]
        sizes = [read_image_size(path)[::-1] for path in encoded.images if isinstance(path, str)]
        items.append(Item(encoded, torch.cat(patches), tuple(sizes)))
    return items


def recipe_of(
    hf_dir: Path, parallel: Mapping[str, Any], precision: str = "fp32", backend: str = "torch", **sections: Any
) -> Any:
    """A recipe for tests."""
    from megavlm.config.schema import ModelConfig, ParallelConfig, Recipe, TrainConfig

    sections.setdefault("train", TrainConfig(precision=precision))
    layout = ParallelConfig(**{"use_distributed_optimizer": False, **parallel})
    return Recipe(model=ModelConfig(hf_dir=str(hf_dir), backend=backend), parallel=layout, **sections)


def compare(
    hf_dir: Path,
    rows: Mapping[str, tuple[Sequence[Item], Reference]],
    parallel: Mapping[str, Any],
    precision: str = "fp32",
    broken: str = "",
    backend: str = "torch",
) -> dict[str, Measured]:
    """Largest differences of this rank's part, by row and by name.

    Args:
        hf_dir: the model.
        rows: samples of each packed row, with what transformers made of them.
        parallel: layout.
        precision: fp32, or bf16 (logits alone).
        broken: what to break on purpose, a key of `MUTATIONS`.
        backend: of the layer specs.
    """
    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.config.numerics import row_multiples
    from megavlm.parallel.groups import initialize
    from megavlm.platform.seeds import seed_everything
    from megavlm.train.parts import build_parts
    from megavlm.train.stages.sft import SupervisedFineTuning

    judge = HFDirectory(hf_dir)
    with mutation(broken):
        recipe = recipe_of(hf_dir, parallel, precision, backend)
        groups = initialize(recipe.parallel)
        seed_everything(recipe.train.seed)
        parts = build_parts(recipe, HFDirectory(hf_dir), groups, 0)
        stage = SupervisedFineTuning(groups)
        measured = {}
        for name, (items, expected) in rows.items():
            batch = pack_items(items, judge.architecture.inputs.patch_channels, *row_multiples(recipe))
            if precision == "bf16":
                with torch.no_grad():
                    measured[name] = _compare_logits(_forward(parts, batch), parts, expected)
            else:
                measured[name] = _compare_all(parts, stage, batch, expected, judge)
    return measured


def _forward(parts: Any, batch: Any) -> torch.Tensor:
    features_VKH = None
    if len(batch.grid_thw_N3):
        features_VKH = parts.encoder_chunk(batch.patches_PC, batch.grid_thw_N3)
    (chunk,) = parts.chunks
    return chunk(features_VKH, batch.tokens_T, batch.position_ids_3T, batch.cu_seqlens, batch.real_T)


def _compare_all(parts: Any, stage: Any, batch: Any, expected: Reference, judge: Any) -> Measured:
    for chunk in parts.wrapped:
        chunk.zero_grad_buffer()
    logits_TW = _forward(parts, batch)
    loss_sum, count, _ = stage.loss(logits_TW, batch)
    loss_sum.backward()
    parts.reduce_gradients()
    parts.scale_gradients(1.0 / count.item())
    measured = _compare_logits(logits_TW.detach(), parts, expected)
    measured["loss"] = abs((loss_sum.detach() / count).item() / expected.loss - 1)
    measured |= compare_gradients(parts.all, expected.gradients, judge)
    if expected.tower_PD is not None and expected.features_VKH is not None:
        with torch.no_grad():
            tower_PD = parts.encoder.vision([batch.patches_PC], batch.grid_thw_N3)[0]
            features_VKH = parts.encoder(batch.patches_PC, batch.grid_thw_N3)
        theirs_VKH = expected.features_VKH
        measured["tower"] = _relative(tower_PD, expected.tower_PD)
        measured["features"] = _relative(features_VKH[:, 0], theirs_VKH[:, 0])
        if features_VKH.shape[1] > 1:
            measured["deepstack"] = _relative(features_VKH[:, 1:], theirs_VKH[:, 1:])
    return measured


def _compare_logits(logits_TW: torch.Tensor, parts: Any, expected: Reference) -> Measured:
    """Padding, at the row's end only, is left out; each rank compares its part of the vocabulary."""
    tensor = parts.groups.tensor
    part_TW = expected.logits_TY.chunk(tensor.size(), dim=1)[tensor.rank()]
    return {"logits": _largest(logits_TW[: len(part_TW)], part_TW)}


def _largest(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return (ours.float() - theirs).abs().max().item()


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return _largest(ours, theirs) / theirs.abs().max().item()


def compare_gradients(models: Sequence[Any], expected: Mapping[str, torch.Tensor | None], judge: Any) -> Measured:
    """|ours - theirs| / |theirs| of the worst native parameter, and the parameters that only one side trains.

    A parameter without gradient there (a frozen or unused one) must have none here, or one that is exactly 0.
    """
    from megavlm.checkpoint.hf_load import shard_of, tied_name
    from megavlm.models.names import named_parameters, stacked_name

    by_native = {entry.native: entry for entry in judge.entries}
    theirs = {judge.family.public_name(name): gradient for name, gradient in expected.items()}
    unused_here, unused_there, zero, worst, worst_name = [], [], [], 0.0, ""
    compared = set()
    for model in models:
        held = dict(named_parameters(model))
        for name, parameter in held.items():
            native, expert = stacked_name(tied_name(name, model))
            entry = by_native[native]
            parts = [theirs[part] for part in entry.names]
            unused_here += [name] if not parameter.requires_grad else []
            if any(part is None for part in parts):
                unused_there.append(name)
                assert all(part is None for part in parts), name
                assert not parameter.requires_grad or not parameter.main_grad.any(), f"{name} has a gradient"
                continue
            if not parameter.requires_grad:
                continue
            whole = entry.to_native(parts)
            part = shard_of(whole if expert is None else whole[expert], parameter, entry, model).to(parameter.device)
            if not part.any():  # an image behind the last word
                assert not parameter.main_grad.any(), f"{name} has a gradient"
                zero += [name] if expert is None else []  # an expert that no token went to has others beside it
                continue
            if name.endswith(".key.bias"):
                # adds the same to all scores of a query: without effect, and what is left here is rounding
                weight = held[name.removesuffix("bias") + "weight"]
                assert parameter.main_grad.norm() < 1e-5 * weight.main_grad.norm(), name
                zero.append(name)
                continue
            difference = ((parameter.main_grad - part).norm() / part.norm()).item()
            compared.add(native)
            assert math.isfinite(difference), name
            if difference >= worst:
                worst, worst_name = difference, name
    return {
        "gradients": worst,
        "worst parameter": worst_name,
        "compared": len(compared),
        "entries": len(judge.entries),
        "zero": zero,
        "unused here": unused_here,
        "unused there": unused_there,
    }


def train_step_against(
    hf_dir: Path,
    rows_file: Path,
    expected: Reference,
    micro_batch_size: int,
    broken: str = "",
    parallel: Mapping[str, Any] = MappingProxyType({}),
) -> Measured:
    """One training step on all rows of a file, in order; ranks that the layout leaves over are data ranks."""
    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.config.schema import DataConfig, OptimizerConfig, TrainConfig
    from megavlm.train.state import build_state
    from megavlm.train.step import train_step

    num_rows = len(rows_file.read_text().splitlines())
    recipe = recipe_of(
        hf_dir,
        parallel,
        data=DataConfig(train=(str(rows_file),), shuffle=False),
        # not clipped: the gradients are looked at after the step
        optimizer=OptimizerConfig(clip_grad=0.0),
        train=TrainConfig(
            train_iters=1, precision="fp32", global_batch_size=num_rows, micro_batch_size=micro_batch_size
        ),
    )
    with mutation(broken):
        state = build_state(recipe)
        result = train_step(state, 0)
    measured = compare_gradients(state.models, expected.gradients, HFDirectory(hf_dir))
    return measured | {"loss": abs(result.loss / expected.loss - 1)}


def round_trip(hf_dir: Path, out_dir: Path, max_shard_bytes: int) -> dict[str, Any]:
    """Load a directory, write it again, load that: names that are on one side only, and tensors that differ."""
    from megavlm.checkpoint.hf_io import HFDirectory, copy_companions, make_empty
    from megavlm.checkpoint.stream import MemoryReader
    from megavlm.checkpoint.stream_export import export_stream
    from megavlm.checkpoint.weight_formats import OneType
    from megavlm.parallel.groups import initialize
    from megavlm.platform.seeds import seed_everything
    from megavlm.train.parts import build_parts

    source = HFDirectory(hf_dir)
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[source.dtype]
    recipe = recipe_of(hf_dir, {}, precision)
    groups = initialize(recipe.parallel)
    seed_everything(0)
    parts = build_parts(recipe, source, groups, 0)
    native = _whole_tensors(parts)
    make_empty(out_dir)
    export_stream(MemoryReader(native), source, out_dir, OneType(source.dtype), max_shard_bytes)
    copy_companions(source.path, out_dir)
    written = HFDirectory(out_dir)
    seed_everything(1)
    again = build_parts(recipe, written, groups, 0)
    return {
        "tensors": len(source.names),
        "dtype": {str(parameter.dtype) for parameter in native.values()},
        "one side only": sorted(set(source.names) ^ set(written.names)),
        "different": [name for name in source.names if not torch.equal(source.read(name), written.read(name))],
        "different native": [
            name for name, value in _whole_tensors(again).items() if not torch.equal(value, native[name])
        ],
    }


def _whole_tensors(parts: Any) -> dict[str, torch.Tensor]:
    """Parameters of a model in one process, under the names and in the form of a checkpoint."""
    from megavlm.models.names import named_parameters, stacked_name

    found: dict[str, list[torch.Tensor]] = {}
    stacks = set()
    for model in parts.all:
        for name, parameter in named_parameters(model):  # a layer's experts come in their order
            native, expert = stacked_name(name)
            assert expert in (None, len(found.setdefault(native, [])))
            stacks |= set() if expert is None else {native}
            found[native].append(parameter.data)
    return {name: torch.stack(each) if name in stacks else each[0] for name, each in found.items()}

"""Where two models part ways: tensor by tensor, in the order in which a forward pass uses them.

Hugging Face directories are compared by native names, so that they can be held against native checkpoints, too.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megavlm.checkpoint.adapters import open_checkpoint
from megavlm.checkpoint.hf_io import HFDirectory
from megavlm.checkpoint.native import find_checkpoint
from megavlm.checkpoint.safetensors_writer import TensorSpec
from megavlm.models.architecture import MaskHeadArchitecture
from megavlm.models.names import COMPONENTS

NUM_SHOWN = 10
_NUMBER = re.compile(r"\d+")
# Parts of a component in the order in which they run; whatever is not named here runs in between.
_FIRST, _LAST = ("embedding", "patch_embed", "class_embedding", "position_table", "pre_norm"), ("final_", "output_")


@dataclass(frozen=True)
class Source:
    """A model's weights by native names: `specs` without reading, `read` one whole tensor."""

    path: Path
    specs: dict[str, TensorSpec]
    read: Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Difference:
    """One tensor that differs: largest and relative difference (by norms); shapes when these differ."""

    name: str
    largest: float
    relative: float
    shapes: str = ""


def source_of(path: Path) -> Source:
    """Open a Hugging Face directory, or a native checkpoint (a step folder, or the newest of a folder of them).

    Raises:
        UseError: it is neither.
    """
    if (path / "config.json").is_file():
        directory = HFDirectory(path)
        if directory.stored_embedding_dim:
            directory = directory.as_embedding_model(directory.stored_embedding_dim, directory.stores_match_head)
        if directory.stored_mask_width:  # which token it reads makes no difference here
            directory = directory.with_mask_head(MaskHeadArchitecture(directory.stored_mask_width, -1))
        directory.check()
        entries = {entry.native: entry for entry in directory.entries}
        specs = {}
        for name, entry in entries.items():
            parts = [directory.spec(one) for one in entry.names]
            whole = entry.to_native([torch.empty(part.shape, dtype=part.dtype, device="meta") for part in parts])
            specs[name] = TensorSpec(tuple(whole.shape), whole.dtype)
        return Source(path, specs, lambda name: directory.read_native(entries[name]))
    folder = find_checkpoint(path, required=True)
    assert folder is not None
    reader = open_checkpoint(folder)
    specs = {name: spec for name, spec in reader.specs.items() if name.split(".")[0] in COMPONENTS}
    return Source(folder, specs, reader.read)


def differences(first: Source, second: Source) -> list[Difference]:
    """Tensors that both have and that differ, in running order; types are not compared, values are, in fp64."""
    found = []
    for name in sorted(set(first.specs) & set(second.specs), key=running_order):
        one, other = first.specs[name].shape, second.specs[name].shape
        if one != other:
            found.append(Difference(name, float("inf"), float("inf"), f"{list(one)} and {list(other)}"))
            continue
        a, b = first.read(name).double(), second.read(name).double()
        if not torch.equal(a, b):
            relative = ((a - b).norm() / a.norm().clamp(min=1e-300)).item()
            found.append(Difference(name, (a - b).abs().max().item(), relative))
    return found


def running_order(name: str) -> tuple[int, int, int, str]:
    """Component, place in it, layer, name."""
    component, _, rest = name.partition(".")
    is_first, is_last = rest.startswith(_FIRST), any(f".{part}" in f".{rest}" for part in _LAST)
    layer = _NUMBER.search(rest)
    return COMPONENTS.index(component), 2 * is_last - is_first, int(layer.group()) if layer else -1, rest


def report(first: Source, second: Source) -> tuple[list[str], bool]:
    """Lines on how two models differ, and whether they do."""
    lines = []
    for one, other in ((first, second), (second, first)):
        alone = sorted(set(one.specs) - set(other.specs), key=running_order)
        if alone:
            more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
            lines.append(f"only in {one.path}: {', '.join(alone[:3])}{more}")
    found = differences(first, second)
    num_common = len(set(first.specs) & set(second.specs))
    if found:
        lines.append(f"they part at {found[0].name}; {len(found)} of {num_common} tensors differ")
        lines += [
            f"  {one.name}: " + (one.shapes or f"largest difference {one.largest:.3g}, relative {one.relative:.3g}")
            for one in found[:NUM_SHOWN]
        ]
        if len(found) > NUM_SHOWN:
            lines.append(f"  and {len(found) - NUM_SHOWN} more")
    elif not lines:
        lines.append(f"equal: all {num_common} tensors, bit for bit in value")
    return lines, bool(found) or len(lines) > 1 or not lines[0].startswith("equal")

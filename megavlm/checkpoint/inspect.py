"""What a Hugging Face directory or a native checkpoint holds, without loading it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from megavlm.checkpoint.hf_io import HFDirectory
from megavlm.checkpoint.manifest import MANIFEST
from megavlm.checkpoint.native import find_checkpoint, read_common
from megavlm.checkpoint.safetensors_writer import TensorSpec
from megavlm.checkpoint.stream import NativeReader
from megavlm.models.names import COMPONENTS


def inspect_hf(path: Path) -> list[str]:
    """Lines on a Hugging Face directory.

    Raises:
        UseError: it is none that can be read, or its tensors are not those that its config speaks of.
    """
    directory = HFDirectory(path)
    directory.check()
    specs: dict[str, TensorSpec] = {}
    for entry in directory.entries:
        for number, name in enumerate(entry.names):
            specs[f"{entry.native} {number}"] = directory.spec(name)
    head = [f"{path}: {directory.family.model_type}, complete"]
    return head + _sizes(specs)


def inspect_native(path: Path) -> list[str]:
    """Lines on a native checkpoint, a step folder or the newest of a folder of them.

    Raises:
        UseError: there is none.
    """
    folder = find_checkpoint(path, required=True)
    assert folder is not None
    common = read_common(folder)["common"]
    specs = NativeReader(folder).specs
    weights = {name: spec for name, spec in specs.items() if name.split(".")[0] in COMPONENTS}
    others = [spec for name, spec in specs.items() if name not in weights]
    kind = "weights alone" if common.get("weights_only") else "weights and optimizer"
    head = [f"{folder}: {common['family']}, step {common['step']}, {kind}; every file of {MANIFEST} is there"]
    lines = head + _sizes(weights)
    if others:
        lines.append(f"  {'optimizer':<12}{_size(others)}")
    return lines


def _sizes(specs: Mapping[str, TensorSpec]) -> list[str]:
    lines = []
    for component in COMPONENTS:
        own = [spec for name, spec in specs.items() if name.split(".")[0] == component]
        lines.append(f"  {component:<12}{_size(own)}")
    return [*lines, f"  {'all':<12}{_size(specs.values())}"]


def _size(specs: Iterable[TensorSpec]) -> str:
    found = list(specs)
    parameters = sum(spec.num_bytes // spec.dtype.itemsize for spec in found)
    dtypes = sorted({str(spec.dtype).removeprefix("torch.") for spec in found})
    num_bytes = sum(spec.num_bytes for spec in found)
    return f"{len(found):>6} tensors  {parameters:>15,} values  {num_bytes / 1e9:>9.3f} GB  {', '.join(dtypes)}"

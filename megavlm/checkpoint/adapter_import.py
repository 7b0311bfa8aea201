"""Reading adapters in the format of the peft package into a rank's parts of a model."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megavlm.checkpoint.adapters import CONFIG, WEIGHTS
from megavlm.checkpoint.hf_io import HFDirectory, read_json
from megavlm.checkpoint.hf_load import shard_of, tied_name
from megavlm.checkpoint.prefix_adapter import PREFIX_TUNING, PrefixFolder
from megavlm.checkpoint.safetensors_reader import SafetensorsFile
from megavlm.errors import use_error
from megavlm.models.linear import AdaptableLinear
from megavlm.models.names import Part, is_adapter, named_parameters, stacked_name
from megavlm.peft.attach import adapted_linears
from megavlm.peft.hf_format import PREFIX, AdapterTensor, adapter_tensors
from megavlm.peft.ia3 import Ia3Adapter
from megavlm.peft.lora import LoraAdapter, scaling_of


class AdapterFolder:
    """A folder with adapter_config.json and adapter_model.safetensors.

    Raises:
        UseError: it holds something else than LoRA or IA3.
    """

    def __init__(self, path: Path, directory: HFDirectory) -> None:
        self.path, self.directory = path, directory
        self.config = read_json(path / CONFIG)
        if self.config.get("peft_type") not in ("LORA", "IA3"):
            kind = self.config.get("peft_type")
            raise use_error(
                str(path / CONFIG), f"peft_type {kind}", f"LORA, IA3 or {PREFIX_TUNING}", "give such an adapter"
            )
        self.file = SafetensorsFile(path / WEIGHTS)
        parameters = [str(name).rpartition(".")[2] for name in self.config.get("target_parameters") or ()]

        def present(native: str) -> bool:
            return ".experts.experts." not in native or native.split(".")[-2] in parameters

        found = adapter_tensors(directory.entries, present, directory.family.memory_name)
        self.tensors = {one.native: one for one in found}
        # Layers behind the feature are never computed: adapters of theirs, which peft makes too, change nothing.
        uncomputed = {one.key for one in found if one.native.startswith("vision.unused.")}
        self.unused = set(self.file.names) - uncomputed
        experts = directory.architecture.language.experts
        self.num_experts = 0 if experts is None else experts.num_experts

    def take(self, key: str) -> torch.Tensor:
        """A tensor of the file."""
        if key not in self.file.names:
            raise use_error(
                str(self.path / WEIGHTS),
                f"no {key}",
                "an adapter for all that the recipe lets learn",
                "set peft.target_modules and peft.components to what the adapter was made for",
            )
        self.unused.discard(key)
        return self.file.read(key)

    def scaling(self, one: AdapterTensor) -> float:
        """Factor on what a projection's matrices add."""
        module = self.directory.family.memory_name(one.module)
        rank = _of_pattern(self.config.get("rank_pattern") or {}, module, self.config["r"])
        alpha = _of_pattern(self.config.get("alpha_pattern") or {}, module, self.config["lora_alpha"])
        return scaling_of(rank, alpha, bool(self.config.get("use_rslora", False)))


def _of_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """peft's rule: the first key that the end of a module's name matches."""
    return next((value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)


@torch.no_grad()
def load_adapter(path: Path, directory: HFDirectory, models: Iterable[Part]) -> None:
    """Fill this rank's adapters, and the weights that learn beside them. Every rank of the world calls this.

    Args:
        path: folder in peft's format.
        directory: of the model.
        models: parts of the model with adapters in them, frozen weights marked.

    Raises:
        UseError: the adapters are of another kind, rank or scaling, or of other modules, than the recipe's.
    """
    models = list(models)
    if read_json(path / CONFIG).get("peft_type") == PREFIX_TUNING:
        PrefixFolder(path, directory.architecture.language).fill(models)
        return
    folder = AdapterFolder(path, directory)
    for model in models:
        for name, linear in adapted_linears(model):
            _fill(folder, name, linear)
        _fill_weights(folder, model)
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, folder.unused)
    unused = sorted(set.intersection(*everyones))
    if unused:
        raise use_error(
            str(path / WEIGHTS),
            f"{len(unused)} tensors that nothing in the recipe takes, such as {unused[0]}",
            "an adapter of what the recipe lets learn",
            "set peft.target_modules and peft.components to what the adapter was made for",
        )


def _fill(folder: AdapterFolder, name: str, linear: AdaptableLinear) -> None:
    adapter = linear.adapter
    assert isinstance(adapter, LoraAdapter | Ia3Adapter)
    for projection, one in adapter.projections.items():
        for kind, parameter in one.named_parameters():
            native, expert = stacked_name(f"{name}.adapter.projections.{projection}.{kind}")
            tensor = folder.tensors[native]
            scaling = folder.scaling(tensor) if isinstance(adapter, LoraAdapter) else 1.0
            if isinstance(adapter, LoraAdapter) and abs(scaling / adapter.scaling - 1) > 1e-6:
                raise use_error(
                    f"{folder.path / CONFIG} {tensor.module}",
                    f"a scaling of {scaling:g}",
                    f"{adapter.scaling:g}, as the recipe says",
                    "set peft.lora_alpha, peft.lora_rank and peft.use_rslora to what the adapter was made with",
                )
            whole = tensor.to_native(folder.take(tensor.key), folder.num_experts)
            part = adapter.part_of(projection, kind, whole if expert is None else whole[expert])
            if part.shape != parameter.shape:
                raise use_error(
                    f"{folder.path / WEIGHTS} {tensor.key}",
                    f"a part of shape {tuple(part.shape)}",
                    f"{tuple(parameter.shape)}",
                    "set peft.lora_rank (or r= in peft.components) to the adapter's",
                )
            parameter.copy_(part)


def _fill_weights(folder: AdapterFolder, model: Part) -> None:
    """Weights of the model itself that learn, where the folder has them (modules_to_save)."""
    entries = {entry.native: entry for entry in folder.directory.entries}
    for name, parameter in named_parameters(model):
        if is_adapter(name) or not parameter.requires_grad:
            continue
        native, expert = stacked_name(tied_name(name, model))
        entry = entries[native]
        keys = [PREFIX + folder.directory.family.memory_name(one) for one in entry.names]
        if not set(keys) <= set(folder.file.names):
            continue
        whole = entry.to_native([folder.take(key) for key in keys])
        parameter.copy_(shard_of(whole if expert is None else whole[expert], parameter, entry, model))

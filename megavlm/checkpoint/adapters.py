"""Checkpoints with adapters: their whole weights, merged or not, and folders in the format of the peft package.

Such a checkpoint holds what learns. The rest stands in the Hugging Face directory that training started from, which it
recognises by a digest.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors.torch import save_file

from megavlm.checkpoint.hf_io import HFDirectory
from megavlm.checkpoint.hf_load import tied_name
from megavlm.checkpoint.native import read_common
from megavlm.checkpoint.safetensors_writer import TensorSpec
from megavlm.checkpoint.stream import NativeReader, RowsInFile
from megavlm.config.load import recipe_from_dict
from megavlm.config.schema import Recipe
from megavlm.config.tuning import Tuning, tuning_plan
from megavlm.errors import use_error
from megavlm.models.build import DTYPES
from megavlm.models.names import Part, component_of, layer_of, named_parameters, stacked_name
from megavlm.models.weight_map import Entry
from megavlm.peft.hf_format import PREFIX, AdapterTensor, adapter_tensors, merged_bias, merged_weight
from megavlm.peft.lora import scaling_of
from megavlm.peft.quantized import is_quantised, quantised_values

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_NUM_SAMPLES, _SAMPLE_BYTES = 32, 1 << 16


def weights_digest(directory: HFDirectory) -> str:
    """Tells weights apart: a hash of names, shapes, and the first 64 KiB of some tensors spread over the model.

    It does not depend on how the tensors are spread over files.
    """
    names = sorted(directory.names)
    hasher = blake3(repr([(name, directory.spec(name)) for name in names]).encode())
    for name in names[:: -(-len(names) // _NUM_SAMPLES)]:
        buffer = bytearray(min(directory.spec(name).num_bytes, _SAMPLE_BYTES))
        directory.read_into(name, 0, memoryview(buffer))
        hasher.update(buffer)
    return hasher.hexdigest()


class AdapterCheckpoint:
    """A checkpoint of a run with adapters, and the directory that it belongs to.

    It reads whole native tensors as `stream.NativeReader` does, adapters merged into them.

    Args:
        folder: the checkpoint's step folder.
        base: the directory.
        merges: whether weights are read with what was learned in them.

    Raises:
        UseError: the directory holds other weights than the run started from; or what was learned is no part of a
            weight, and is to be merged.
    """

    def __init__(self, folder: Path, base: HFDirectory, merges: bool = True) -> None:
        self.folder, self.base = folder, base
        common = read_common(folder)["common"]
        if common["base_digest"] != weights_digest(base):
            raise use_error(
                str(base.path),
                "other weights than those that the adapters were trained beside",
                f"the weights of {common['base']}",
                "give that directory",
            )
        self.recipe: Recipe = recipe_from_dict(common["tuning"])
        self.plan = tuning_plan(self.recipe)
        self.methods = {rule.tuning.method for rule in self.plan.rules} - {"full", "frozen"}
        if merges:
            self.check_merges()
        self.learned = NativeReader(folder)
        self.tensors = adapter_tensors(base.entries, self.learned.specs.__contains__, base.family.memory_name)
        self._of_entry: dict[str, list[AdapterTensor]] = {}
        for one in self.tensors:
            self._of_entry.setdefault(one.entry.native, []).append(one)
        self._entries = {entry.native: entry for entry in base.entries}
        self.specs = {name: self._spec(entry) for name, entry in self._entries.items()}

    def check_merges(self) -> None:
        """Raise `UseError` unless all that was learned is a part of a weight, or a weight."""
        others = sorted(self.methods - {"lora", "ia3"})
        if others:
            raise use_error(
                str(self.folder),
                f"adapters that are no part of a weight ({', '.join(others)})",
                "lora or ia3, which can be merged and have a place in peft's format",
                "export a prefix with --adapter-only; with all others go on with native checkpoints: training resumes "
                "from them in any layout",
            )

    def _spec(self, entry: Entry) -> TensorSpec:
        if entry.native in self.learned.specs:
            return self.learned.specs[entry.native]
        shapes = [torch.empty(self.base.spec(name).shape, device="meta") for name in entry.names]
        dtype = self.base.spec(entry.names[0]).dtype
        return TensorSpec(tuple(entry.to_native(shapes).shape), dtype)

    def tuning_of(self, entry: Entry) -> Tuning:
        """How the layer of a weight was tuned."""
        return self.plan.of(component_of(entry.native), layer_of(entry.native))

    def scaling_of(self, entry: Entry) -> float:
        """Factor on what the adapter of a weight adds; of one that multiplies it, 1."""
        tuning = self.tuning_of(entry)
        if tuning.method != "lora":
            return 1.0
        return scaling_of(tuning.rank, tuning.alpha, self.recipe.peft.use_rslora)

    def _base_weight(self, entry: Entry) -> torch.Tensor:
        """As the adapter was trained beside it: quantised, where it was."""
        if not self._is_quantised(entry):
            return self.base.read_native(entry)
        dtype = DTYPES[self.recipe.train.precision]

        def values(tensor: torch.Tensor) -> torch.Tensor:
            return quantised_values(tensor, self.recipe.peft, dtype).to(tensor.dtype)

        if entry.stacked:
            return torch.stack([values(matrix) for matrix in self.base.read_native(entry)])
        return entry.to_native([values(self.base.read(name)) for name in entry.names])

    def _is_quantised(self, entry: Entry) -> bool:
        name = entry.native.removesuffix(".weight")
        linears = (
            "linear_qkv",
            "linear_proj",
            "linear_fc1",
            "linear_fc2",
            "linear_query",
            "linear_key",
            "linear_value",
        )
        return entry.native != name and name.endswith(linears) and is_quantised(name, self.plan, self.recipe.peft)

    def rows(self, name: str) -> list[RowsInFile] | None:
        """Where the bytes of what is learned as a whole lie, as `NativeReader` says."""
        return self.learned.rows(name) if name in self.learned.specs else None

    def read(self, name: str) -> torch.Tensor:
        """One whole native tensor: learned, or the directory's with what its adapter adds (computed in fp32)."""
        entry = self._entries[name]
        if name in self.learned.specs:
            return self.learned.read(name)
        weight = self._base_weight(entry)
        found = self._of_entry.get(name, [])
        if name.endswith(".bias"):
            beside = f"{name.removesuffix('.bias')}.weight"
            scaled = self._of_entry.get(beside, [])
            if scaled:
                return merged_bias(self._entries[beside], weight, self.learned.read, scaled).to(weight.dtype)
        if not found:
            return weight
        return merged_weight(entry, weight, self.learned.read, found, self.scaling_of(entry)).to(weight.dtype)


def open_checkpoint(
    folder: Path, directory: HFDirectory | None = None, merges: bool = True
) -> NativeReader | AdapterCheckpoint:
    """A reader of a checkpoint's whole weights.

    Args:
        folder: the checkpoint's step folder.
        directory: that the run started from; None: the one that the checkpoint names, where it needs one.
        merges: whether weights are read with what was learned in them.
    """
    common = read_common(folder)["common"]
    if common.get("tuning"):
        return AdapterCheckpoint(folder, directory or HFDirectory(common["base"]), merges)
    return NativeReader(folder)


@torch.no_grad()
def fill_models(checkpoint: AdapterCheckpoint, models: Iterable[Part]) -> None:
    """Fill the parts of a whole model, in one process, with a checkpoint's weights, adapters merged into them."""
    stack: tuple[str, torch.Tensor] | None = None
    for model in models:
        for name, parameter in named_parameters(model):
            native, expert = stacked_name(tied_name(name, model))
            if expert is None:
                parameter.copy_(checkpoint.read(native))
                continue
            if stack is None or stack[0] != native:
                stack = native, checkpoint.read(native)
            parameter.copy_(stack[1][expert])


def write_adapter(checkpoint: AdapterCheckpoint, out_dir: Path, dtype: torch.dtype | None) -> None:
    """Write what was learned as a folder that `peft.PeftModel.from_pretrained` loads.

    Args:
        checkpoint: to write.
        out_dir: an existing, empty directory.
        dtype: of the written weights; None: as they are.

    Raises:
        UseError: something was learned that has no place in that format.
    """
    tensors = {one.key: one.to_hf(checkpoint.learned.read(one.native)) for one in checkpoint.tensors}
    modules_to_save = []
    for entry in checkpoint.base.entries:
        if entry.native not in checkpoint.learned.specs:
            continue
        for name, part in zip(entry.names, entry.to_hf(checkpoint.learned.read(entry.native)), strict=True):
            path = checkpoint.base.family.memory_name(name)
            module, _, parameter = path.rpartition(".")
            if parameter not in ("weight", "bias"):
                raise use_error(
                    f"{checkpoint.folder} {path}",
                    "a learned weight that is no module's `weight` or `bias`",
                    "what peft keeps beside adapters (modules_to_save)",
                    "export the merged model instead: leave out --adapter-only",
                )
            modules_to_save.append(module)
            tensors[PREFIX + path] = part
    written = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}
    save_file(written, out_dir / WEIGHTS, metadata={"format": "pt"})
    config = _config(checkpoint, sorted(set(modules_to_save)))
    (out_dir / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _ia3_config(checkpoint: AdapterCheckpoint, modules_to_save: Sequence[str]) -> dict[str, Any]:
    memory_name = checkpoint.base.family.memory_name
    if any(one.entry.stacked for one in checkpoint.tensors):
        raise use_error(
            str(checkpoint.folder),
            "ia3 of experts",
            "ia3 of linears, as in peft",
            "export the merged model instead: leave out --adapter-only",
        )
    return {
        "peft_type": "IA3",
        "auto_mapping": None,
        "base_model_name_or_path": str(checkpoint.base.path),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_ia3_weights": True,
        "target_modules": sorted(memory_name(one.module) for one in checkpoint.tensors),
        "feedforward_modules": sorted(memory_name(one.module) for one in checkpoint.tensors if one.scales_inputs),
        "modules_to_save": list(modules_to_save) or None,
        "task_type": None,
    }


def _config(checkpoint: AdapterCheckpoint, modules_to_save: Sequence[str]) -> dict[str, Any]:
    """adapter_config.json: modules by their whole names, so that no other module is meant."""
    memory_name, peft = checkpoint.base.family.memory_name, checkpoint.recipe.peft
    methods = {checkpoint.tuning_of(one.entry).method for one in checkpoint.tensors}
    if len(methods) > 1:
        raise use_error(
            str(checkpoint.folder),
            "both lora and ia3",
            "adapters of one kind, as in peft",
            "export the merged model instead: leave out --adapter-only",
        )
    if "ia3" in methods:
        return _ia3_config(checkpoint, modules_to_save)
    modules: dict[str, Tuning] = {}
    parameters: dict[str, Tuning] = {}
    for one in checkpoint.tensors:
        (parameters if one.entry.stacked else modules)[memory_name(one.module)] = checkpoint.tuning_of(one.entry)
    tunings = modules | parameters
    ranks = Counter(tuning.rank for tuning in tunings.values())
    alphas = Counter(tuning.alpha for tuning in tunings.values())
    rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": str(checkpoint.base.path),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else peft.lora_dropout,  # peft has none beside experts
        "use_rslora": peft.use_rslora,
        "use_dora": peft.use_dora,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters, reverse=True) or None,  # gate_up_proj before down_proj, as peft nests
        "rank_pattern": {name: tuning.rank for name, tuning in tunings.items() if tuning.rank != rank},
        "alpha_pattern": {name: tuning.alpha for name, tuning in tunings.items() if tuning.alpha != alpha},
        "modules_to_save": list(modules_to_save) or None,
        "task_type": None,
    }

"""Adapters under the names and in the shapes of the peft package, and back; and weights with adapters merged.

A projection's matrices are peft's own, except that one which is a whole linear here has its rows in the linear's order,
and that experts are stacked: peft keeps A of a layer's experts one below the other, and B with the experts innermost.

Source: formats checked against peft 0.21 (LoraLayer, ParamWrapper).

Shape suffixes: R rank, I inputs, O outputs, E experts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megavlm.models.weight_map import Entry
from megavlm.peft.targets import module_names, projection_names

ROW_PARALLEL = ("linear_proj", "linear_fc2")
"""Ends of our names of linears whose inputs tensor-parallel ranks share."""
PREFIX = "base_model.model."
KINDS = {"lora_A": ".weight", "lora_B": ".weight", "lora_magnitude_vector": "", "ia3_l": ""}
"""Parameters of a projection, and what peft puts behind their names."""


@dataclass(frozen=True)
class AdapterTensor:
    """One tensor of an adapter.

    Attributes:
        native: our name of it.
        key: peft's name of it in adapter_model.safetensors.
        entry: of the adapted weight.
        number: of the projection in the entry.
        kind: one of KINDS.
    """

    native: str
    key: str
    entry: Entry
    number: int
    kind: str

    @property
    def module(self) -> str:
        """Hugging Face name of the projection, as weight maps have it."""
        return module_names(self.entry)[self.number]

    def to_hf(self, tensor: torch.Tensor) -> torch.Tensor:
        """The whole native tensor in peft's shape."""
        if self.kind == "ia3_l":
            return tensor[None] if self.scales_inputs else self._hf_rows(tensor)[:, None]
        if self.entry.stacked:
            return tensor.flatten(0, 1) if self.kind == "lora_A" else tensor.permute(1, 2, 0).flatten(1)
        return tensor if self.kind == "lora_A" else self._hf_rows(tensor)

    def _hf_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.entry.to_hf(tensor)[0] if len(self.entry.names) == 1 else tensor

    @property
    def scales_inputs(self) -> bool:
        """Of a vector: whether its numbers are inputs' (of row-parallel linears), not outputs'."""
        return native_module(self.entry).endswith(ROW_PARALLEL)

    def to_native(self, tensor: torch.Tensor, num_experts: int) -> torch.Tensor:
        """Back."""
        if self.kind == "ia3_l":
            return tensor[0] if self.scales_inputs else self._native_rows(tensor[:, 0])
        if self.entry.stacked:
            if self.kind == "lora_A":
                return tensor.unflatten(0, (num_experts, -1))
            return tensor.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
        return tensor if self.kind == "lora_A" else self._native_rows(tensor)

    def _native_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.entry.to_native([tensor]) if len(self.entry.names) == 1 else tensor


def adapter_tensors(
    entries: Iterable[Entry], present: Callable[[str], bool], memory_name: Callable[[str], str]
) -> list[AdapterTensor]:
    """All tensors of a model's adapter.

    Args:
        entries: weight map of the whole model.
        present: whether the adapter has a tensor of a native name.
        memory_name: of the family.
    """
    found = []
    num_stacks: dict[str, int] = {}
    for entry in entries:
        for number, projection in enumerate(projection_names(entry)):
            prefix = f"{native_module(entry)}.adapter.projections.{projection}."
            kinds = [kind for kind in KINDS if present(f"{prefix}{kind}")]
            if not kinds:
                continue
            module = memory_name(module_names(entry)[number])
            if entry.stacked:  # the parameters of a module that are adapted lie around each other, the first inside
                module = module.rpartition(".")[0]
                num_stacks[module] = num_stacks.get(module, 0) + 1
            for kind in kinds:
                found.append(
                    AdapterTensor(f"{prefix}{kind}", f"{PREFIX}{module}.{kind}{KINDS[kind]}", entry, number, kind)
                )
    return [_nested(one, num_stacks, memory_name) for one in found]


def _nested(one: AdapterTensor, num_stacks: Mapping[str, int], memory_name: Callable[[str], str]) -> AdapterTensor:
    module, _, parameter = memory_name(one.module).rpartition(".")
    if not one.entry.stacked or num_stacks[module] == 1 or parameter != "gate_up_proj":
        return one
    return AdapterTensor(one.native, f"{PREFIX}{module}.base_layer.{one.kind}.weight", one.entry, one.number, one.kind)


def native_module(entry: Entry) -> str:
    """Our name of the linear whose weight an entry is."""
    return entry.native.removesuffix(".weight")


def merged_weight(
    entry: Entry,
    weight: torch.Tensor,
    read: Callable[[str], torch.Tensor],
    found: Sequence[AdapterTensor],
    scaling: float,
) -> torch.Tensor:
    """fp32, a whole native weight with its adapter in it.

    Args:
        entry: of the weight.
        weight: [out, in], of experts [experts, out, in].
        read: native name to a whole tensor of the adapter.
        found: the adapter's tensors of this entry.
        scaling: factor on B A.

    Vectors (IA3) multiply rows or columns instead.
    """
    by_place = {(one.number, one.kind): read(one.native).float() for one in found}
    merged = weight.float().clone()
    numbers = None
    if len(entry.names) > 1:
        numbers = entry.to_hf(torch.arange(len(weight))[:, None])
    for number in sorted({one.number for one in found}):
        rows = slice(None) if numbers is None else numbers[number][:, 0]
        if (number, "ia3_l") in by_place:
            vector = by_place[number, "ia3_l"]
            merged[rows] *= vector if found[0].scales_inputs else vector[:, None]
            continue
        part = merged[rows] + scaling * (by_place[number, "lora_B"] @ by_place[number, "lora_A"])
        if (number, "lora_magnitude_vector") in by_place:
            part *= (by_place[number, "lora_magnitude_vector"] / part.norm(dim=1))[:, None]
        merged[rows] = part
    return merged


def merged_bias(
    weight_entry: Entry, bias: torch.Tensor, read: Callable[[str], torch.Tensor], found: Sequence[AdapterTensor]
) -> torch.Tensor:
    """fp32, a whole native bias: vectors that scale outputs scale it, too.

    Args:
        weight_entry: of the weight beside it.
        bias: [out].
        read: native name to a whole tensor of the adapter.
        found: the adapter's tensors of the weight.
    """
    merged = bias.float().clone()
    numbers = weight_entry.to_hf(torch.arange(len(bias))[:, None]) if len(weight_entry.names) > 1 else None
    for one in found:
        if one.kind == "ia3_l" and not one.scales_inputs:
            rows = slice(None) if numbers is None else numbers[one.number][:, 0]
            merged[rows] *= read(one.native).float()
    return merged

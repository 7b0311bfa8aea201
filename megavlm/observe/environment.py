"""What a run ran on, as text for its first log row: versions by package metadata, nothing is imported for it."""

import importlib.metadata
import os
import platform

PACKAGES = (
    "megavlm",
    "torch",
    "megatron-core",
    "transformers",
    "transformer-engine",
    "flash-attn",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
)


def collect_environment() -> dict[str, str]:
    """Versions of Python and of the installed packages that shape a run, the platform, and the number of CPU cores.

    Packages that are not installed are left out. No host name, user name or path is recorded: reports travel.
    """
    facts = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu cores": str(os.cpu_count()),
    }
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts

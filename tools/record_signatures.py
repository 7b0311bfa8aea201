"""Record what a GPU-only package offers, from its files, without importing or building it: tests/contracts/*.json.

Calls of ours, and of Megatron-Core on our behalf, are checked against these records where no GPU is
(tests/unit/contracts), and the stand-in for Transformer Engine takes its surface from them. To make one again:

    python tools/record_signatures.py transformer-engine 2.11.0
    python tools/record_signatures.py flash-attn 2.8.3.post2
    python tools/record_signatures.py apex COMMIT --folder path/to/a/clone/of/NVIDIA/apex

Wheels and source archives are downloaded by pip and only read.
"""

import argparse
import ast
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT_DIR = Path(__file__).resolve().parents[1] / "tests" / "contracts"


@dataclass(frozen=True)
class Package:
    """What to record of a package.

    Attributes:
        source: where its files come from.
        modules: those whose exported names are recorded, where this version has them.
        signatures: `module:Class` (its `__init__`, `__call__`, `forward` and `step`) or `module:function`.
        pip_arguments: further arguments of `pip download`.
    """

    source: str
    modules: tuple[str, ...]
    signatures: tuple[str, ...]
    pip_arguments: tuple[str, ...] = ()


_TE = "transformer_engine.pytorch."
_TE_MODULES = (
    "attention attention.rope constants cpp_extensions cpu_offload cpu_offload_v1 cross_entropy distributed ep "
    "float8_tensor fp8 graph module module._common module.base module.layernorm module.layernorm_linear module.linear "
    "ops ops.basic ops.basic.grouped_linear optimizers permutation quantization quantized_tensor router tensor "
    "tensor.float8_blockwise_tensor tensor.float8_tensor tensor.grouped_tensor tensor.mxfp8_tensor tensor.nvfp4_tensor "
    "tensor.utils utils"
).split()
PACKAGES = {
    "transformer-engine": Package(
        "https://pypi.org/project/transformer-engine",
        (
            "transformer_engine",
            "transformer_engine.common",
            "transformer_engine.common.recipe",
            "transformer_engine.pytorch",
            # what Megatron-Core 0.16.1 or 0.19.2 imports
            *(_TE + name for name in _TE_MODULES),
        ),
        (
            f"{_TE}module.linear:Linear",
            f"{_TE}module.layernorm_linear:LayerNormLinear",
            f"{_TE}module.grouped_linear:GroupedLinear",
            f"{_TE}module.layernorm:LayerNorm",
            f"{_TE}module.rmsnorm:RMSNorm",
            f"{_TE}module.base:initialize_ub",
            f"{_TE}attention.dot_product_attention.dot_product_attention:DotProductAttention",
            f"{_TE}attention.rope:apply_rotary_pos_emb",
            f"{_TE}cpp_extensions.gemm:general_gemm",
            f"{_TE}cpu_offload:get_cpu_offload_context",
            f"{_TE}cross_entropy:parallel_cross_entropy",
            f"{_TE}distributed:checkpoint",
            f"{_TE}distributed:activation_recompute_forward",
            f"{_TE}optimizers.fused_adam:FusedAdam",
            f"{_TE}optimizers.multi_tensor_apply:MultiTensorApply",
            f"{_TE}permutation:moe_permute",
            f"{_TE}permutation:moe_permute_with_probs",
            f"{_TE}permutation:moe_unpermute",
            f"{_TE}quantization:autocast",
            f"{_TE}quantization:fp8_autocast",
            f"{_TE}fp8:fp8_autocast",
            "transformer_engine.common.recipe:DelayedScaling",
            "transformer_engine.common.recipe:Float8CurrentScaling",
            "transformer_engine.common.recipe:Float8BlockScaling",
            "transformer_engine.common.recipe:MXFP8BlockScaling",
            "transformer_engine.common.recipe:NVFP4BlockScaling",
        ),
    ),
    "flash-attn": Package(
        "https://pypi.org/project/flash-attn",
        ("flash_attn",),
        ("flash_attn.flash_attn_interface:flash_attn_varlen_func",),
        ("--no-binary", "flash-attn", "--no-build-isolation"),
    ),
    "apex": Package(
        "https://github.com/NVIDIA/apex",
        ("apex.optimizers", "apex.multi_tensor_apply"),
        ("apex.optimizers.fused_adam:FusedAdam", "apex.multi_tensor_apply.multi_tensor_apply:MultiTensorApply"),
    ),
}
_METHODS = ("__init__", "__call__", "forward", "step")
# Exported names that nobody imports: of Python itself, and what a module names for its own use.
_COMMON = frozenset({"annotations", "os", "sys", "math", "warnings", "logging", "functools", "torch", "np", "F", "nn"})


class Files:
    """Python files of a package by the name of their module, whether they are in an archive or a folder."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.trees: dict[str, ast.Module] = {}
        for path, text in texts.items():
            name = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
            self.trees[name] = ast.parse(text)
        self.packages = {path.removesuffix("/__init__.py").replace("/", ".") for path in texts if "__init__" in path}

    def exports(self, module: str, seen: frozenset[str] = frozenset()) -> set[str]:
        """Names that can be imported from a module; what `import *` brings included."""
        names: set[str] = set()
        if module not in self.trees or module in seen:
            return names
        for node in _statements(self.trees[module].body):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Import):
                names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                target = self._absolute(module, node)
                for alias in node.names:
                    starred = (
                        self.exports(target, seen | {module}) if alias.name == "*" else {alias.asname or alias.name}
                    )
                    names |= starred
            elif isinstance(node, ast.Assign):
                names |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
        names |= {name.rpartition(".")[2] for name in self.trees if name.rpartition(".")[0] == module}
        return names

    def signatures(self, module: str, name: str) -> dict[str, list[dict[str, Any]]]:
        """Parameters of a function, or of a class's methods, by `module:name` or `module:name.method`."""
        for node in _statements(self.trees[module].body if module in self.trees else []):
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return {f"{module}:{name}": _parameters(node.args)}
            if isinstance(node, ast.ClassDef) and node.name == name:
                return dict(self._methods(module, node))
        return {}

    def _methods(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        fields = []
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name in _METHODS:
                yield f"{module}:{node.name}.{item.name}", _parameters(item.args)
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                field = {"name": item.target.id, "kind": "POSITIONAL_OR_KEYWORD"}
                fields.append(field if item.value is None else field | {"default": ast.unparse(item.value)})
        if fields and not any(isinstance(item, ast.FunctionDef) and item.name == "__init__" for item in node.body):
            # a dataclass
            yield (
                f"{module}:{node.name}.__init__",
                [{"name": "self", "kind": "POSITIONAL_OR_KEYWORD"}, *fields],
            )

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        base = parts[: len(parts) - node.level + (module in self.packages)]
        return ".".join(base + ([node.module] if node.module else []))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported, also those under `if` and `try`."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            yield from _statements(node.body)
            yield from _statements(node.orelse)
        elif isinstance(node, ast.Try):
            yield from _statements(node.body)
            for handler in node.handlers:
                yield from _statements(handler.body)


def _parameters(arguments: ast.arguments) -> list[dict[str, Any]]:
    """Parameters in the order and with the kinds of `inspect.Parameter`; defaults as source text."""
    found: list[dict[str, Any]] = []
    plain = [(item, "POSITIONAL_ONLY") for item in arguments.posonlyargs]
    plain += [(item, "POSITIONAL_OR_KEYWORD") for item in arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    for (item, kind), default in zip(plain, defaults, strict=True):
        found.append(_parameter(item.arg, kind, default))
    if arguments.vararg:
        found.append(_parameter(arguments.vararg.arg, "VAR_POSITIONAL", None))
    for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(_parameter(item.arg, "KEYWORD_ONLY", default))
    if arguments.kwarg:
        found.append(_parameter(arguments.kwarg.arg, "VAR_KEYWORD", None))
    return found


def _parameter(name: str, kind: str, default: ast.expr | None) -> dict[str, Any]:
    found = {"name": name, "kind": kind}
    return found if default is None else found | {"default": ast.unparse(default)}


def read_archive(path: Path) -> dict[str, str]:
    """Python files of a wheel or source archive, by their path as an installation would have it."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {name: wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".py")}
    texts = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            file = archive.extractfile(member) if name.endswith(".py") else None
            if file is not None:
                texts[name] = file.read().decode()
    return texts


def download(name: str, version: str, arguments: tuple[str, ...], folder: Path) -> Path:
    """Fetch an archive; nothing of it is run but what pip needs of a source archive to name its version."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", f"{name}=={version}", "--dest", str(folder)]
    environment = os.environ | {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
    subprocess.run([*command, *arguments], check=True, env=environment)
    (path,) = folder.iterdir()
    return path


def record(name: str, version: str, texts: Mapping[str, str], sha256: str) -> dict[str, Any]:
    """What is recorded of a package."""
    package, top = PACKAGES[name], PACKAGES[name].modules[0].partition(".")[0]
    files = Files({path: text for path, text in texts.items() if path.startswith(f"{top}/")})
    modules = [module for module in package.modules if module in files.trees]
    signatures: dict[str, Any] = {}
    for item in package.signatures:
        signatures |= files.signatures(*item.split(":"))
    return {
        "package": name,
        "version": version,
        "source": package.source,
        "sha256": sha256,
        "command": f"python tools/record_signatures.py {name} {version}",
        "exports": {module: sorted(files.exports(module) - _COMMON) for module in modules},
        "signatures": signatures,
    }


def write(content: Mapping[str, Any]) -> Path:
    """Write a record with a line for each name, so that changes of a version can be read."""
    path = OUT_DIR / f"{content['package']}-{content['version']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {key: content[key] for key in ("package", "version", "source", "sha256", "command")}
    lines = [json.dumps(head, indent=1)[:-2] + ","]
    for key in ("exports", "signatures"):
        rows = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in content[key].items()]
        lines.append(f' "{key}": {{\n' + ",\n".join(rows) + "\n }" + ("," if key == "exports" else ""))
    path.write_text("\n".join(lines) + "\n}\n", encoding="utf-8")
    return path


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=list(PACKAGES))
    parser.add_argument("version", help="version, or the commit of a clone")
    parser.add_argument("--folder", type=Path, help="read a clone instead of downloading")
    options = parser.parse_args()
    if options.folder:
        texts = {
            path.relative_to(options.folder).as_posix(): path.read_text(encoding="utf-8")
            for path in options.folder.rglob("*.py")
        }
        print(write(record(options.package, options.version, texts, "")))  # a commit is a hash already
        return
    with tempfile.TemporaryDirectory() as folder:
        archive = download(options.package, options.version, PACKAGES[options.package].pip_arguments, Path(folder))
        sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
        print(write(record(options.package, options.version, read_archive(archive), sha256)))


if __name__ == "__main__":
    main()

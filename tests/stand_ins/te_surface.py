"""The modules of the stand-in, made when they are imported: names of the recorded version, and what is implemented."""

import enum
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

from tests import contracts

_TOP = "transformer_engine"
_NATIVE = "transformer_engine_torch"


class DType(enum.IntEnum):
    """Of the compiled part the only name that Megatron-Core 0.19 needs while it is imported."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat8E8M0 = 9
    kFloat4E2M1 = 10


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the recorded modules, and fills them."""

    def __init__(self, contract: contracts.Contract, implemented: dict[str, Any]) -> None:
        self.contract, self.implemented = contract, implemented
        self.placeholders: dict[str, type] = {}

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None = None, _target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec for a recorded module, or for the compiled part of the package."""
        if fullname in self.contract.exports or fullname == _NATIVE:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, _spec: importlib.machinery.ModuleSpec) -> None:
        """Have Python make the module."""

    def exec_module(self, module: types.ModuleType) -> None:
        """Fill the module; the package itself imports all others, as `te.common.recipe` is read without an import."""
        name = module.__name__
        if name == _NATIVE:
            vars(module)["DType"] = DType
        for export in self.contract.exports.get(name, ()):
            if f"{name}.{export}" not in self.contract.exports:
                vars(module)[export] = self.implemented.get(export) or self._placeholder(export)
        if name == _TOP:
            vars(module)["__version__"] = self.contract.version
            for other in self.contract.exports:
                importlib.import_module(other)

    def _placeholder(self, name: str) -> type:
        """One class for a name, wherever it is exported, so that `isinstance` can be asked."""
        if name not in self.placeholders:

            def refuse(_self: object, *_args: Any, **_kwargs: Any) -> None:
                raise NotImplementedError(f"the stand-in for Transformer Engine has no {name}")

            self.placeholders[name] = type(name, (), {"__init__": refuse})
        return self.placeholders[name]


def install(version: str) -> None:
    """Make `import transformer_engine` find the stand-in. Before anything imports megatron."""
    assert not any(name.partition(".")[0] in (_TOP, "megatron") for name in sys.modules), "too late"
    contract = contracts.load("transformer-engine", version)
    from tests.stand_ins import calls

    calls.use(contract)
    from tests.stand_ins.te import IMPLEMENTED

    sys.meta_path.insert(0, _Finder(contract, IMPLEMENTED))

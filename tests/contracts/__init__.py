"""What GPU-only packages offer, by package and version, as `tools/record_signatures.py` has read from their files."""

import ast
import functools
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent
TRANSFORMER_ENGINE = ("2.11.0", "2.20.2")
"""Versions of Transformer Engine: the newest that Megatron-Core 0.16 takes, and the newest that 0.19 may get."""
FLASH_ATTENTION = "2.8.3.post2"
APEX = "004da4edfc08853393bfc8ef3e2436f652176f13"


@dataclass(frozen=True)
class Expression:
    """A default that is no literal, as its source text."""

    text: str


@dataclass(frozen=True)
class Contract:
    """One version of a package.

    Attributes:
        package: its name.
        version: of the package.
        exports: names that each recorded module offers.
        signatures: parameters by `module:function` or `module:Class.method`.
    """

    package: str
    version: str
    exports: dict[str, frozenset[str]]
    signatures: dict[str, inspect.Signature]

    def signature(self, name: str) -> inspect.Signature:
        """The only signature whose name ends with this, e.g. `Linear.forward`."""
        found = [key for key in self.signatures if key.rpartition(":")[2] == name]
        assert len(found) == 1, f"{name}: {found}"
        return self.signatures[found[0]]


@functools.cache
def load(package: str, version: str) -> Contract:
    """Read a record."""
    content = json.loads((DIRECTORY / f"{package}-{version}.json").read_text(encoding="utf-8"))
    return Contract(
        package=content["package"],
        version=content["version"],
        exports={module: frozenset(names) for module, names in content["exports"].items()},
        signatures={name: _signature(rows) for name, rows in content["signatures"].items()},
    )


def _signature(rows: list[dict[str, str]]) -> inspect.Signature:
    kinds = vars(inspect.Parameter)
    return inspect.Signature(
        [inspect.Parameter(row["name"], kinds[row["kind"]], default=_default(row.get("default"))) for row in rows]
    )


def _default(text: str | None) -> Any:
    if text is None:
        return inspect.Parameter.empty
    try:
        return ast.literal_eval(text)
    except ValueError:
        return Expression(text)

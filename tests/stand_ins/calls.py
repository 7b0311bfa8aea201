"""Each call of a stand-in is bound to the signature of the real package."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from tests import contracts

_in_use: dict[str, contracts.Contract] = {}
seen: dict[str, int] = {}
"""Number of calls by name, e.g. `Linear.forward`."""


def use(contract: contracts.Contract) -> None:
    """Check calls of its package against this version from now on."""
    _in_use[contract.package] = contract


def version() -> tuple[int, int]:
    """Major and minor version of Transformer Engine that is stood in for."""
    major, minor, *_ = _in_use["transformer-engine"].version.split(".")
    return int(major), int(minor)


def contracted(
    name: str, *ignored: str, package: str = "transformer-engine"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Bind each call to the recorded signature `name` before the function gets it.

    The function takes what it honours by the package's names; any other argument must have its default.

    Args:
        name: e.g. `Linear.forward`.
        *ignored: arguments that change only how fast or where something is computed.
        package: whose it is.

    Raises:
        TypeError: the real package would not take the call.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        honoured = set(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            signature = _in_use[package].signature(name)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = dict(bound.arguments)
            for parameter in signature.parameters.values():
                value = given[parameter.name]
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    given |= given.pop(parameter.name)
                elif parameter.name not in honoured and parameter.name not in ignored and value != parameter.default:
                    raise NotImplementedError(f"the stand-in's {name} does not know {parameter.name}={value!r}")
            unknown = set(given) - honoured - set(ignored) - set(signature.parameters)
            assert not unknown, f"the stand-in's {name} does not know {unknown}"
            seen[name] = seen.get(name, 0) + 1
            return function(**{key: value for key, value in given.items() if key in honoured})

        return call

    return decorate

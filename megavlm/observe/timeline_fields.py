"""Reads the values of a JSON file one by one, so that every wrong one is an error that names the file and the key."""

import math
import sys
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from megavlm.errors import UseError, use_error


class Fields:
    """One JSON object of a file.

    Args:
        file: for messages.
        where: path of keys to the object, e.g. `measured.ranks[0][3]`; empty for the outermost one.
        entry: what stands there.

    Raises:
        UseError: `entry` is no object; so does every method for a value that is missing or cannot be.
    """

    def __init__(self, file: str, where: str, entry: Any) -> None:
        self._file, self._where = file, where
        if not isinstance(entry, dict):
            raise _error(f"{file} {where}".strip(), _show(entry), "an object")
        self._entry = entry

    def fail(self, name: str, got: object, expected: str) -> NoReturn:
        """Raise the error for the key `name`."""
        raise _error(f"{self._file} {self._key(name)}", got, expected)

    def check_names(self, required: Collection[str], optional: Collection[str] = ()) -> None:
        """All the required keys are there, and no others but the optional ones."""
        for name in sorted(required):
            self._value(name)
        for name in sorted(self._entry.keys() - set(required) - set(optional)):
            self.fail(name, _show(self._entry[name]), f"no key of this name (there are {', '.join(sorted(required))})")

    def is_null(self, name: str) -> bool:
        """Whether the key is missing or null."""
        return self._entry.get(name) is None

    def child(self, name: str) -> "Fields":
        """An object within this one."""
        return Fields(self._file, self._key(name), self._value(name))

    def text(self, name: str) -> str:
        """A string."""
        value = self._value(name)
        if not isinstance(value, str):
            self.fail(name, _show(value), "a string")
        return value

    def choice(self, name: str, choices: Sequence[Any]) -> Any:
        """One of the given values."""
        value = self._value(name)
        if isinstance(value, bool) or value not in choices:
            self.fail(name, _show(value), " or ".join(str(choice) for choice in choices))
        return value

    def integer(self, name: str, at_least: int = 0, below: int | None = None) -> int:
        """A whole number of at least `at_least` and less than `below`."""
        value = self._value(name)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or value < at_least or (below is not None and value >= below):
            bound = f"{at_least}..{below - 1}" if below is not None else f"at least {at_least}"
            self.fail(name, _show(value), f"a whole number, {bound}")
        return int(value)

    def number(self, name: str, above: float | None = None, at_most: float = math.inf) -> float:
        """A finite number, not negative, greater than `above` and not greater than `at_most`."""
        value = self._value(name)
        if not _is_amount(value) or value > at_most or (above is not None and value <= above):
            bound = "not negative" if above is None else f"above {above:g}"
            bound += f", at most {at_most:g}" if at_most < math.inf else ""
            self.fail(name, _show(value), f"a number, {bound}")
        return float(value)

    def entries(self, name: str, at_least: int = 0) -> list[Any]:
        """A list of at least so many entries."""
        value = self._value(name)
        if not isinstance(value, list) or len(value) < at_least:
            self.fail(name, _show(value), f"a list of at least {at_least} entries" if at_least else "a list")
        return value

    def rows(self, name: str, index: int) -> Sequence["Fields"]:
        """The objects of the list that is entry `index` of the list `name`."""
        row, key = self.entries(name)[index], f"{name}[{index}]"
        if not isinstance(row, list):
            self.fail(key, _show(row), "a list")
        return [Fields(self._file, self._key(f"{key}[{number}]"), entry) for number, entry in enumerate(row)]

    def table(self, name: str, num_rows: int, num_columns: int) -> tuple[tuple[float, ...], ...]:
        """Finite numbers, not negative, in a list of lists of this shape."""
        rows = self.entries(name)
        if len(rows) != num_rows:
            self.fail(name, f"{len(rows)} rows", f"{num_rows}, one for each pipeline rank")
        for index, row in enumerate(rows):
            if not isinstance(row, list) or len(row) != num_columns or not all(_is_amount(value) for value in row):
                expected = f"a list of {num_columns} numbers that are not negative, one for each microbatch"
                self.fail(f"{name}[{index}]", _show(row), expected)
        return tuple(tuple(float(value) for value in row) for row in rows)

    def _value(self, name: str) -> Any:
        if name not in self._entry:
            self.fail(name, "nothing", "this key")
        return self._entry[name]

    def _key(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _error(where: str, got: object, expected: str) -> UseError:
    return use_error(where, got, expected, "record the step again, or remove the file")

"""JSON as rows have it: bytes of one row to a Python object, within bounds."""

import json
from typing import Any

from megavlm.errors import UseError, use_error

MAX_DEPTH = 64
"""Objects and lists within each other; rows of any known format have fewer than ten."""


def parse_row(data: bytes, where: str) -> Any:
    """What the JSON of one row says.

    Args:
        data: UTF-8.
        where: file and row, for messages.

    Raises:
        UseError: broken JSON, or nested deeper than `MAX_DEPTH`.
    """
    try:
        row = json.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise _too_deep(where) from error
    except ValueError as error:
        raise use_error(where, f"broken JSON ({error})", "valid UTF-8 JSON", "repair or remove the row") from error
    level = [row]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level if isinstance(value, dict | list) for inner in _inside(value)]
        if not level:
            return row
    raise _too_deep(where)


def _inside(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _too_deep(where: str) -> UseError:
    got = f"JSON with more than {MAX_DEPTH} objects or lists within each other"
    return use_error(where, got, "a row of turns, images and columns", "repair or remove the row")


def check_row_size(num_bytes: int, max_row_bytes: int, where: str) -> None:
    """Refuse a row before it is read.

    Raises:
        UseError: it is longer than `data.max_row_bytes`.
    """
    if num_bytes > max_row_bytes:
        raise use_error(
            where,
            f"a row of {num_bytes:,} bytes",
            f"at most data.max_row_bytes {max_row_bytes:,}",
            "repair or remove the row, or raise data.max_row_bytes",
        )

"""Formats of rows, one module each, told apart by their keys; a file may mix them."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megavlm.data.formats import caption, document, llava, preference, reward, sharegpt, steps, swift
from megavlm.data.formats.columns import Columns
from megavlm.data.formats.turns import row_error
from megavlm.data.references import References
from megavlm.data.row_options import RowOptions
from megavlm.data.sample import Sample

__all__ = ["FORMATS", "Format", "read_row"]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        keys: what a row of it has, for messages.
        fits: whether a row is of it.
        read: makes a sample of the row.
    """

    keys: str
    fits: Callable[[Columns], bool]
    read: Callable[[Columns, str, RowOptions], Sample]


FORMATS = {
    "swift": Format("`messages`", swift.fits, swift.read),
    "llava": Format("`conversations`", llava.fits, llava.read),
    "sharegpt": Format("`conversations` with `chosen` and `rejected`", sharegpt.fits, sharegpt.read),
    "preference": Format("`prompt`, `chosen` and `rejected`", preference.fits, preference.read),
    "steps": Format("`prompt`, `completions` and `labels`", steps.fits, steps.read),
    "reward": Format("`problem` and `answer`", reward.fits, reward.read),
    "caption": Format("`txt`", caption.fits, caption.read),
    "document": Format("`text`", document.fits, document.read),
}


def read_row(row: Any, where: str, sample_id: str, references: References, options: RowOptions) -> Sample:
    """A row as its file has it, as a sample.

    Raises:
        UseError: it is of no format or of two, or something in it is wrong; one line that names file and row.
    """
    if not isinstance(row, dict):
        raise row_error(where, type(row).__name__, "a JSON object")
    columns = Columns(row, where, references, options.frames_fps)
    fitting = [one for one in FORMATS.values() if one.fits(columns)]
    if len(fitting) != 1:
        got = f"the keys {sorted(row)}"
        if fitting:
            got += f", which fit {' and '.join(one.keys for one in fitting)}"
        raise row_error(where, got, f"exactly one of {', or '.join(one.keys for one in FORMATS.values())}")
    sample = fitting[0].read(columns, sample_id, options)
    if not options.group_by:
        return sample
    group = row.get(options.group_by)
    if not isinstance(group, str | int) or group == "":
        raise row_error(where, f"{group!r} as {options.group_by}", "words or a whole number (data.group_by)")
    return dataclasses.replace(sample, group=json.dumps(group))

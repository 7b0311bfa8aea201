"""The rows of files one by one, so that a row that cannot be read does not hide those behind it."""

from collections.abc import Sequence

from megavlm.config.schema import DataConfig
from megavlm.data.row_options import row_options
from megavlm.data.rows import Rows
from megavlm.data.sample import Sample
from megavlm.errors import UseError


def open_rows(paths: Sequence[str], data: DataConfig | None = None) -> Rows:
    """All rows of all files, in order; taking one that cannot be read raises its UseError.

    Args:
        paths: files, folders and patterns.
        data: how rows are read; None: by the defaults.

    Raises:
        UseError: a file that is missing, empty, or holds no rows.
    """
    return Rows.open(paths, row_options(data or DataConfig()))


def read_row(samples: Sequence[Sample], row: int) -> Sample | UseError:
    """A row, or why it cannot be read."""
    try:
        return samples[row]
    except UseError as error:
        return error

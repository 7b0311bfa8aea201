"""Files that a reader never meets half written."""

import os
from pathlib import Path

from megavlm.errors import RunError


def replace_text(path: Path, text: str) -> Path:
    """Write under another name and rename; returns `path`.

    Raises:
        RunError: it cannot be written.
    """
    fresh = path.with_name(f".{path.name}.tmp")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}") from error
    return path

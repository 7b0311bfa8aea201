"""The one place that knows how the Megatron-Core versions differ."""

from importlib import metadata

from megavlm.errors import use_error

OLDEST = (0, 16, 1)
BELOW = (0, 20, 0)


def version() -> tuple[int, int, int]:
    """Installed megatron-core version as (major, minor, patch)."""
    parts = metadata.version("megatron-core").split("+")[0].split(".")
    digits = ["".join(character for character in part if character.isdigit()) or "0" for part in parts[:3]]
    numbers = [int(part) for part in digits] + [0, 0]
    return numbers[0], numbers[1], numbers[2]


def check_version() -> None:
    """Raise `UseError` unless the installed megatron-core lies in the supported range."""
    found = version()
    if not OLDEST <= found < BELOW:
        raise use_error(
            "megatron-core",
            ".".join(map(str, found)),
            ">=0.16.1,<0.20",
            'pip install "megatron-core>=0.16.1,<0.20"',
        )

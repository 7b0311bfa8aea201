"""The frame of the command line: finds the command, runs it, and turns what it raises into an exit code.

Each command is one module with `SUMMARY: str`, `add_arguments(parser)` (which also sets `parser.epilog` to a working
example) and `run(args) -> int`. It is imported when it is asked for, and imports torch only inside `run`.
"""

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from megavlm import __version__
from megavlm.cli.report import HINT, report, say
from megavlm.errors import UseError

COMMANDS: dict[str, str] = {
    "train": "megavlm.cli.train",
    "launch": "megavlm.cli.launch_command",
    "iterate": "megavlm.cli.iterate",
    "compose": "megavlm.cli.compose",
    "add-tokens": "megavlm.cli.add_tokens",
    "convert": "megavlm.cli.convert",
    "generate": "megavlm.cli.generate",
    "data": "megavlm.cli.data",
    "plan": "megavlm.cli.plan",
    "ranks": "megavlm.cli.ranks",
    "report": "megavlm.cli.report_run",
    "doctor": "megavlm.cli.doctor",
}
# Commands of commands, `megavlm data check ...`: their modules have COMMANDS of their own.
GROUPS = ("data",)
_EPILOG = """\
examples:
  megavlm doctor
  megavlm train recipe.yaml train.train_iters=100 --nproc 4
  megavlm COMMAND --help

exit codes: 0 done, 1 the run failed, 2 it was asked for something that cannot be, 130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as every other mistake is: one line, by way of `UseError`."""

    def error(self, message: str) -> NoReturn:
        raise UseError(f"{message}; fix: `{self.prog} --help` shows how")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: the words after the program's name; None: those of this process.

    Returns:
        The exit code: 0 done, 1 the run failed, 2 a mistake of the user, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except Exception as error:  # the last stop before the user
        if "--debug" in words:
            traceback.print_exception(error)
        return report(error, hint="" if "--debug" in words else HINT)


def _run(words: list[str]) -> int:
    """Split the words at the command, and let the command's own parser read what follows it."""
    at = next((index for index, word in enumerate(words) if not word.startswith("-")), len(words))
    options, command, rest = words[:at], words[at : at + 1], words[at + 1 :]
    asks_help = bool({"-h", "--help"} & set(options)) or not (command or "--version" in options)
    frame = _frame_parser(asks_help)
    try:
        frame.parse_args(options)
        if not command:
            frame.print_help(sys.stderr)
            return 2
        name = command[0]
        if name not in COMMANDS:
            frame.error(f"unknown command `{name}` (there are {', '.join(COMMANDS)})")
        module = importlib.import_module(COMMANDS[name])
        if name in GROUPS:
            name, module, rest = _member(name, module, rest)
        # Intermixed: options may stand between the positional words, as in `RECIPE --nproc 2 key=value`.
        args = _command_parser(name, module).parse_intermixed_args(rest)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    return int(module.run(args))


def _member(group: str, module: ModuleType, rest: list[str]) -> tuple[str, ModuleType, list[str]]:
    """The command of a group that is named first among the words, and the other words; the group itself if none is."""
    at = next((index for index, word in enumerate(rest) if not word.startswith("-")), len(rest))
    if at == len(rest) or rest[at] not in module.COMMANDS:
        return group, module, rest
    return f"{group} {rest[at]}", importlib.import_module(module.COMMANDS[rest[at]]), rest[:at] + rest[at + 1 :]


def _frame_parser(lists_commands: bool) -> _Parser:
    """Build the parser of what stands before the command; only listing the commands imports them all."""
    lines = []
    if lists_commands:
        lines = [f"  {name:<10}{importlib.import_module(module).SUMMARY}" for name, module in COMMANDS.items()]
    parser = _Parser(
        prog="megavlm",
        usage="megavlm [--version] [--debug] COMMAND ...",
        description="Train vision-language models with Megatron-Core.\n\ncommands:\n" + "\n".join(lines),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megavlm {__version__}")
    _add_debug(parser)
    return parser


def _command_parser(name: str, module: ModuleType) -> _Parser:
    parser = _Parser(
        prog=f"megavlm {name}",
        description=module.SUMMARY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    _add_debug(parser)
    return parser


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")

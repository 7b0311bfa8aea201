"""The import rules and size limits of `megavlm/`, checked over the syntax tree. docs/architecture.md explains them.

Imports inside functions and under TYPE_CHECKING count too: a rule that can be put off is not a rule. Only what a
module reaches through OTHER modules (`reachable`) is counted by the imports that run when a module is imported.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80

# Which rooms a room may import, beside itself. `megavlm.errors` and `megavlm.config` are open to everybody.
ALLOWED_ROOMS: dict[str, frozenset[str]] = {
    "config": frozenset(),
    "platform": frozenset(),
    "data": frozenset({"platform"}),
    "losses": frozenset({"platform"}),
    "parallel": frozenset({"platform"}),
    "precision": frozenset(),
    "models": frozenset({"platform", "parallel", "precision"}),
    "pipeline": frozenset({"platform", "parallel"}),
    "planner": frozenset({"platform", "data", "models", "parallel", "pipeline"}),
    "peft": frozenset({"platform", "models", "parallel"}),
    "observe": frozenset({"platform", "data"}),
    "checkpoint": frozenset({"platform", "data", "models", "parallel", "peft", "precision"}),
    "rollout": frozenset({"platform", "data", "models", "parallel", "checkpoint"}),
    "evaluate": frozenset({"platform", "data", "models", "parallel", "checkpoint", "rollout", "observe"}),
    "train": frozenset(
        "platform data losses parallel models pipeline planner peft observe checkpoint rollout evaluate".split()
    ),
    "cli": frozenset(
        "platform data losses parallel models pipeline planner peft observe checkpoint rollout evaluate train".split()
    ),
}
OPEN_TO_ALL = frozenset({"errors", "config"})

# Packages that a room never imports, neither itself nor through another module at import time.
FORBIDDEN_PACKAGES: dict[str, frozenset[str]] = {
    "config": frozenset({"torch", "megatron", "transformers"}),
    "data": frozenset({"megatron"}),
    "losses": frozenset({"megatron"}),
    "planner": frozenset({"megatron"}),
    "precision": frozenset({"megatron"}),
}

# Where transformers may be imported: files, and whole rooms.
TRANSFORMERS_FILES = frozenset({"megavlm.data.tokens", "megavlm.checkpoint.hf_io"})
TRANSFORMERS_ROOMS = frozenset({"evaluate"})

# The repository's other folders, which the library never imports.
OUTSIDE = frozenset({"tools", "examples", "tests"})

_UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX)\b")


@dataclass(frozen=True)
class Import:
    """One imported name: `module` for `import module`, `module.name` for `from module import name`."""

    name: str
    line: int
    at_import: bool
    """Runs when the module is imported (not in a function, not for type checkers only)."""


def package_of(name: str) -> str:
    """First part of a dotted name."""
    return name.partition(".")[0]


def room_of(module: str) -> str:
    """`data` of `megavlm.data.tokens`, `errors` of `megavlm.errors`, empty for `megavlm` itself."""
    return module.split(".")[1] if "." in module else ""


def imports_of(module: str, tree: ast.Module, is_package: bool = False) -> list[Import]:
    """Every import of a module, relative ones made absolute, literal `import_module("...")` calls included."""
    found: list[Import] = []

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, is_package, node)
            found.extend(Import(f"{base}.{alias.name}", node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.Call) and _last_name(node.func) in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                found.append(Import(node.args[0].value, node.lineno, at_import))
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and _last_name(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                visit(statement, False)
            for statement in node.orelse:
                visit(statement, at_import)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, at_import and not deferred)

    visit(tree, True)
    return found


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What one module of `megavlm` breaks, as `line N: what`; empty when it keeps all the rules."""
    tree = ast.parse(source)
    found = [f"line {item.line}: {text}" for item, text in _import_violations(module, tree, is_package)]
    found += _cuda_questions(module, tree)
    found += _sizes(tree, source)
    found += _loose_ends(tree, source)
    return found


def reachable(module: str, imports: Mapping[str, list[Import]]) -> dict[str, tuple[str, ...]]:
    """Packages outside megavlm that importing `module` imports, each with the chain of modules that leads there.

    Args:
        module: where to start.
        imports: imports of every module of megavlm by its dotted name.
    """
    packages: dict[str, tuple[str, ...]] = {}
    seen: set[str] = set()
    todo: list[tuple[str, ...]] = [(name,) for name in _with_parents(module)]
    while todo:
        chain = todo.pop()
        if chain[-1] in seen:
            continue
        seen.add(chain[-1])
        for item in imports.get(chain[-1], []):
            if not item.at_import:
                continue
            if package_of(item.name) != "megavlm":
                packages.setdefault(package_of(item.name), chain)
            todo.extend((*chain, name) for name in _with_parents(item.name) if name in imports)
    return packages


def _with_parents(module: str) -> list[str]:
    """`a.b.c` runs `a`, `a.b` and `a.b.c`."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _absolute(module: str, is_package: bool, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join(base + ([node.module] if node.module else []))


def _last_name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _import_violations(module: str, tree: ast.Module, is_package: bool) -> Iterator[tuple[Import, str]]:
    room = room_of(module)
    for item in imports_of(module, tree, is_package):
        package, target = package_of(item.name), room_of(item.name)
        if package in OUTSIDE:
            yield item, f"the library imports {package}"
        if item.name == "megatron.training" or item.name.startswith("megatron.training."):
            yield item, "nobody imports megatron.training"
        if package in FORBIDDEN_PACKAGES.get(room, ()):
            yield item, f"{room} imports {package}"
        if package == "transformers" and module not in TRANSFORMERS_FILES and room not in TRANSFORMERS_ROOMS:
            yield item, f"transformers outside {', '.join(sorted(TRANSFORMERS_FILES))} and evaluate"
        if package == "megavlm" and room in ALLOWED_ROOMS and target in ALLOWED_ROOMS:
            if target != room and target not in ALLOWED_ROOMS[room] | OPEN_TO_ALL:
                yield item, f"{room} imports {target}"


def _cuda_questions(module: str, tree: ast.Module) -> list[str]:
    """`torch.cuda.is_available`, called or named, and its import."""
    if room_of(module) == "platform":
        return []
    lines = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "is_available" and _last_name(node.value) == "cuda"
    ]
    lines += [item.line for item in imports_of(module, tree) if item.name == "torch.cuda.is_available"]
    return [f"line {line}: only platform asks torch.cuda.is_available" for line in lines]


def _sizes(tree: ast.Module, source: str) -> list[str]:
    found = []
    num_lines = len(source.splitlines())
    if num_lines > MAX_FILE_LINES:
        found.append(f"line {num_lines}: the file is longer than {MAX_FILE_LINES} lines")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"line {node.lineno}: {node.name} has {length} lines, more than {MAX_FUNCTION_LINES}")
    return found


def _loose_ends(tree: ast.Module, source: str) -> list[str]:
    """Handlers that swallow, and comments that put work off."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and all(_does_nothing(statement) for statement in node.body):
            found.append(f"line {node.lineno}: the exception is swallowed")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING) and _UNFINISHED.search(token.string):
            found.append(f"line {token.start[0]}: unfinished work belongs in the tracker")
    return found


def _does_nothing(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )

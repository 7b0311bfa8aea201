import ast
from pathlib import Path

import pytest

from tests.layer_rules import (
    ALLOWED_ROOMS,
    FORBIDDEN_PACKAGES,
    MAX_FILE_LINES,
    MAX_FUNCTION_LINES,
    Import,
    imports_of,
    reachable,
    room_of,
    violations,
)

LIBRARY = Path(__file__).resolve().parents[2] / "megavlm"
FILES = sorted(LIBRARY.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = ("megavlm", *path.relative_to(LIBRARY).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.fixture(scope="module")
def library_imports() -> dict[str, list[Import]]:
    return {
        module_name(path): imports_of(
            module_name(path), ast.parse(path.read_text(encoding="utf-8")), path.name == "__init__.py"
        )
        for path in FILES
    }


def ids(path: Path) -> str:
    return str(path.relative_to(LIBRARY))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_module_keeps_the_rules(path: Path) -> None:
    found = violations(module_name(path), path.read_text(encoding="utf-8"), path.name == "__init__.py")
    assert not found, "\n" + "\n".join(f"{path.relative_to(LIBRARY.parent)} {text}" for text in found)


def test_every_room_has_its_rules_and_is_a_package() -> None:
    rooms = {path.relative_to(LIBRARY).parts[0] for path in FILES if path.parent != LIBRARY}
    assert rooms <= set(ALLOWED_ROOMS)
    folders = {path.parent for path in FILES}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    done: list[str] = []
    while ready := [room for room in ALLOWED_ROOMS if room not in done and ALLOWED_ROOMS[room] <= set(done)]:
        done += ready
    assert set(done) == set(ALLOWED_ROOMS)


@pytest.mark.parametrize("room", sorted(FORBIDDEN_PACKAGES))
def test_room_does_not_reach_what_it_must_not(room: str, library_imports: dict[str, list[Import]]) -> None:
    for module in library_imports:
        if room_of(module) == room:
            reached = reachable(module, library_imports)
            for package in FORBIDDEN_PACKAGES[room] & set(reached):
                pytest.fail(f"importing {module} imports {package}, through {' -> '.join(reached[package])}")


LONG_FUNCTION = "def long():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
BAD_MODULES = [
    ("megavlm.config.load", "import torch", "config imports torch"),
    ("megavlm.config.load", "def f():\n    from megatron.core import mpu", "config imports megatron"),
    ("megavlm.config.load", "from megavlm.data import sample", "config imports data"),
    ("megavlm.config.load", "from ..data.sample import Sample", "config imports data"),
    ("megavlm.data.packing", "import megatron.core", "data imports megatron"),
    ("megavlm.data.packing", "from megavlm import models", "data imports models"),
    ("megavlm.data.packing", "if TYPE_CHECKING:\n    from megavlm.models import vlm", "data imports models"),
    ("megavlm.losses.reduce", "import importlib\nimportlib.import_module('megatron.core')", "losses imports megatron"),
    ("megavlm.losses.reduce", "from megavlm.data.sample import Batch", "losses imports data"),
    ("megavlm.planner.search", "from megatron.core import mpu", "planner imports megatron"),
    ("megavlm.models.chunk", "from megavlm.pipeline import runtime", "models imports pipeline"),
    ("megavlm.models.chunk", "from transformers import AutoConfig", "transformers outside"),
    ("megavlm.data.images", "import transformers", "transformers outside"),
    ("megavlm.parallel.groups", "from megavlm.models import vlm", "parallel imports models"),
    ("megavlm.pipeline.runtime", "import megavlm.models.chunk", "pipeline imports models"),
    ("megavlm.train.loop", "from megavlm.cli import main", "train imports cli"),
    ("megavlm.train.loop", "import megatron.training", "megatron.training"),
    ("megavlm.train.loop", "from megatron import training", "megatron.training"),
    ("megavlm.train.loop", "from megatron.training.utils import x", "megatron.training"),
    ("megavlm.train.loop", "from tests.pool import WorkerPool", "the library imports tests"),
    ("megavlm.cli.train", "import tools.update_readme", "the library imports tools"),
    ("megavlm.train.loop", "import torch\nok = torch.cuda.is_available()", "only platform asks"),
    ("megavlm.train.loop", "from torch import cuda\nask = cuda.is_available", "only platform asks"),
    ("megavlm.train.loop", "from torch.cuda import is_available", "only platform asks"),
    ("megavlm.train.loop", "x = 1\n" * (MAX_FILE_LINES + 1), "the file is longer"),
    ("megavlm.train.loop", LONG_FUNCTION, "long has"),
    ("megavlm.train.loop", "try:\n    f()\nexcept OSError:\n    pass", "swallowed"),
    ("megavlm.train.loop", "try:\n    f()\nexcept OSError:\n    ...", "swallowed"),
    ("megavlm.train.loop", "x = 1  # TODO later", "unfinished"),
    ("megavlm.train.loop", 'def f():\n    """FIXME"""', "unfinished"),
]


@pytest.mark.parametrize(("module", "source", "expected"), BAD_MODULES)
def test_a_bad_module_is_caught(module: str, source: str, expected: str) -> None:
    found = violations(module, source)
    assert len(found) == 1 and expected in found[0], found


GOOD_MODULES = [
    ("megavlm.data.tokens", "from transformers import AutoTokenizer\nimport torch"),
    ("megavlm.evaluate.runner", "import transformers"),
    ("megavlm.checkpoint.hf_io", "def f():\n    import transformers"),
    ("megavlm.models.chunk", "from megavlm.parallel.groups import Groups\nfrom .rope import x\nimport megatron.core"),
    ("megavlm.platform.cpu", "import torch\nprint(torch.cuda.is_available())"),
    ("megavlm.losses.reduce", "from megavlm.errors import use_error\nfrom megavlm.config.schema import Recipe"),
    ("megavlm.train.loop", '"""Says torch.cuda.is_available in words only."""'),
    ("megavlm.train.loop", "x = 1\n" * MAX_FILE_LINES),
    ("megavlm.train.loop", "try:\n    f()\nexcept OSError:\n    g()"),
]


@pytest.mark.parametrize(("module", "source"), GOOD_MODULES)
def test_a_good_module_passes(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_a_package_resolves_its_relative_imports() -> None:
    [item] = imports_of("megavlm.models", ast.parse("from .rope import x"), is_package=True)
    assert item.name == "megavlm.models.rope.x"


def test_what_another_module_imports_is_reached() -> None:
    imports = {
        "megavlm": [],
        "megavlm.data": [],
        "megavlm.data.loader": imports_of("megavlm.data.loader", ast.parse("from megavlm.platform import log")),
        "megavlm.platform": imports_of("megavlm.platform", ast.parse("import megatron.core"), True),
        "megavlm.platform.log": imports_of("megavlm.platform.log", ast.parse("def f():\n    import scipy")),
    }
    assert reachable("megavlm.data.loader", imports) == {"megatron": ("megavlm.data.loader", "megavlm.platform")}

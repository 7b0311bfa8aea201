"""What Megatron-Core and we ask of packages that only a machine with a GPU has, against records of these packages."""

import ast
import importlib.util
import inspect
from pathlib import Path

import pytest

from tests import contracts
from tests.contracts import TRANSFORMER_ENGINE

pytestmark = pytest.mark.next_core

# Names that the recorded versions no longer have, or not yet. Megatron-Core asks for the version, or does without:
# `_SplitAlongDim` becomes torch.split; without `get_workspace` the router's product is torch's; without
# `multi_tensor_scale_tensor` 0.19 takes its own functions for clipping.
GONE = {
    "transformer_engine.pytorch.attention._SplitAlongDim",
    "transformer_engine.pytorch.attention.apply_rotary_pos_emb",
    "transformer_engine.pytorch.cpp_extensions.cast_to_fp8",
    "transformer_engine.pytorch.module.base.get_workspace",
}
ABSENT = {
    TRANSFORMER_ENGINE[0]: GONE
    | {
        "transformer_engine.pytorch.ops.GroupedLinear",
        "transformer_engine.pytorch.ops.ScaledClampedQGeGLU",
        "transformer_engine.pytorch.ops.ScaledSReLU",
        "transformer_engine.pytorch.ops.ScaledSwiGLU",
        "transformer_engine.pytorch.ops.basic.grouped_linear.GRAD_INPUT_BUFFER_KEY",
        "transformer_engine.pytorch.ops.basic.grouped_linear.OUTPUT_BUFFER_KEY",
        "transformer_engine.pytorch.optimizers.multi_tensor_scale_tensor",
        "transformer_engine.pytorch.permutation.moe_permute_and_pad_with_probs",
        "transformer_engine.pytorch.tensor.grouped_tensor.GroupedTensor",
    },
    TRANSFORMER_ENGINE[-1]: GONE,
}
# Files of Megatron-Core that run in our training.
ON_OUR_PATH = (
    "extensions/transformer_engine.py",
    "fp8_utils.py",
    "optimizer/__init__.py",
    "optimizer/clip_grads.py",
    "optimizer/distrib_optimizer.py",
    "optimizer/optimizer.py",
    "tensor_parallel/random.py",
    "tensor_parallel/layers.py",
    "transformer/attention.py",
    "transformer/moe/experts.py",
    "transformer/moe/moe_utils.py",
    "transformer/transformer_block.py",
    "transformer/transformer_layer.py",
    "utils.py",
)


def core_dir() -> Path:
    """Where Megatron-Core is, without importing it."""
    spec = importlib.util.find_spec("megatron")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "core"


def imported_names(path: Path) -> set[str]:
    """`module.name` of everything of Transformer Engine that a file imports by name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {
        f"{node.module}.{alias.name}"
        for node in nodes
        if (node.module or "").startswith("transformer_engine.")
        for alias in node.names
    }


@pytest.mark.parametrize("version", TRANSFORMER_ENGINE)
def test_what_megatron_core_imports_is_there(version: str) -> None:
    contract = contracts.load("transformer-engine", version)
    names = set().union(*(imported_names(core_dir() / file) for file in ON_OUR_PATH))
    assert {"transformer_engine.pytorch.fp8.fp8_autocast", "transformer_engine.pytorch.optimizers.FusedAdam"} <= names
    missing = {name for name in names if name not in contract.exports and not is_exported(contract, name)}
    assert missing <= ABSENT[version]


def is_exported(contract: contracts.Contract, name: str) -> bool:
    """Whether a module offers a name, by `module.name`."""
    module, _, last = name.rpartition(".")
    return last in contract.exports.get(module, ())


@pytest.mark.parametrize("version", TRANSFORMER_ENGINE)
def test_calls_of_the_wrappers_bind(version: str) -> None:
    """The keywords of every `super().__init__(...)` and `te.pytorch.X(...)` in Megatron-Core's wrappers."""
    contract = contracts.load("transformer-engine", version)
    tree = ast.parse((core_dir() / "extensions/transformer_engine.py").read_text(encoding="utf-8"))
    checked = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = {base.attr for base in node.bases if isinstance(base, ast.Attribute)}
            for name in bases & {"Linear", "LayerNormLinear", "GroupedLinear", "DotProductAttention"}:
                for call in calls_of(node, "__init__"):
                    bind(contract.signature(f"{name}.__init__"), call)
                    checked.add(name)
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("LayerNorm", "RMSNorm")
        ):
            if ast.unparse(node.func).startswith("te.pytorch.") and ".ops." not in ast.unparse(node.func):
                bind(contract.signature(f"{node.func.attr}.__init__"), node)
                checked.add(node.func.attr)
    # 0.19 names the norms in a table, and calls what it finds there; that is seen over the stand-in
    assert {"Linear", "LayerNormLinear", "GroupedLinear", "DotProductAttention"} <= checked


def calls_of(node: ast.ClassDef, method: str) -> list[ast.Call]:
    """Calls `super().method(...)` inside a class."""
    return [
        call
        for call in ast.walk(node)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == method
        and ast.unparse(call.func.value) == "super()"
    ]


def bind(signature: inspect.Signature, call: ast.Call) -> None:
    """Bind what is written out in a call; `**` may bring more, which runs over the stand-in check."""
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
    signature.bind_partial(None, *call.args, **keywords)


def test_a_call_that_does_not_fit_is_found() -> None:
    signature = contracts.load("transformer-engine", TRANSFORMER_ENGINE[0]).signature("Linear.__init__")
    (call,) = (node for node in ast.walk(ast.parse("f(in_features=1, no_such_thing=2)")) if isinstance(node, ast.Call))
    with pytest.raises(TypeError, match="no_such_thing"):
        bind(signature, call)


@pytest.mark.parametrize("version", TRANSFORMER_ENGINE)
def test_records_have_what_stand_ins_implement(version: str) -> None:
    contract = contracts.load("transformer-engine", version)
    for module in ("te", "te_modules", "te_attention"):
        path = Path(__file__).resolve().parents[1] / "stand_ins" / f"{module}.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "contracted":
                    names = {argument.arg for argument in node.args.args}
                    parameters = set(contract.signature(ast.literal_eval(decorator.args[0])).parameters)
                    assert names <= parameters, (ast.unparse(decorator), names - parameters)


@pytest.mark.parametrize(
    ("package", "version", "name"),
    [
        *(("transformer-engine", version, "FusedAdam.__init__") for version in TRANSFORMER_ENGINE),
        ("apex", contracts.APEX, "FusedAdam.__init__"),
    ],
)
def test_optimizers_take_what_megatron_core_gives_them(package: str, version: str, name: str) -> None:
    tree = ast.parse((core_dir() / "optimizer/__init__.py").read_text(encoding="utf-8"))
    given = [
        {ast.literal_eval(key) for key in node.value.keys if key is not None}
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "kwargs"
        and isinstance(node.value, ast.Dict)
    ]
    (keys,) = [keys for keys in given if "betas" in keys]
    contracts.load(package, version).signature(name).bind(None, **dict.fromkeys(keys | {"adam_w_mode"}))

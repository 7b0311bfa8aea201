"""What adapters are refused, before any is made."""

import pytest

from megavlm.config.peft import PeftConfig
from megavlm.config.schema import Recipe
from megavlm.config.tuning import tuning_plan
from megavlm.errors import UseError
from tests.pool import PoolKeeper

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def refusals(backend: str, use_dora: bool, target_modules: tuple[str, ...]) -> str:
    """What is said of a mixture; nothing: it is taken."""
    from megavlm.models.weight_map import transposed_experts
    from megavlm.peft.attach import _check_experts

    peft = PeftConfig(tuner_type="lora", use_dora=use_dora, target_modules=target_modules)
    name = "language.decoder.layers.0.mlp.experts.experts.linear_fc1.weight"
    entry = transposed_experts(name, "model.layers.0.mlp.experts.gate_up_proj", 8, True)
    try:
        _check_experts([entry], tuning_plan(Recipe(peft=peft)), peft, backend)
    except UseError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("backend", "use_dora", "target_modules", "message"),
    [
        ("torch", False, ("all-linear",), ""),
        ("flash", False, ("all-linear",), ""),
        ("te", False, ("all-linear",), "all experts in one grouped product"),
        ("te", False, ("mlp.experts.gate_up_proj",), "all experts in one grouped product"),
        ("te", False, ATTENTION, ""),
        ("te", True, ATTENTION, ""),
        ("torch", True, ("all-linear",), "peft.use_dora: got true for experts"),
    ],
)
def test_experts(
    workers: PoolKeeper, backend: str, use_dora: bool, target_modules: tuple[str, ...], message: str
) -> None:
    (said,) = workers(1).run(refusals, backend=backend, use_dora=use_dora, target_modules=target_modules)
    assert message in said and bool(said) == bool(message)

"""Cross-modal adapters against the formula in plain torch, hooked behind the linears of transformers' model."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.evidence import record, row
from tests.parity import cases, cross_modal_cases
from tests.parity.cases import TOLERANCES
from tests.parity.reference import load_reference, reference
from tests.parity.rows import synthetic_rows

SIZE = 6
PEFT = {"components": f"vision: frozen, projector: frozen, language: cross_modal_adapter size={SIZE}"}
LINEARS = {"o_proj": "linear_proj", "down_proj": "linear_fc2"}
LAYOUTS = {
    "TP1": ({}, {}),
    "TP1, recompute mlp": ({}, {"recompute_granularity": "selective", "recompute_modules": ("mlp",)}),
    "TP2+SP": ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, {}),
}


class Theirs:
    """A model with random adapters as hooks, and what it makes of some rows."""

    def __init__(self, hf_dir, spec):
        self.model = load_reference(hf_dir)
        generator = torch.Generator().manual_seed(3)
        self.weights = {}
        self.is_visual_S1 = torch.zeros(0)
        self.model.register_forward_pre_hook(self._look, with_kwargs=True)
        language = self.model.model.language_model
        for number, layer in enumerate(language.layers):
            for linear, native in ((layer.self_attn.o_proj, "o_proj"), (layer.mlp.down_proj, "down_proj")):
                prefix = f"{number}.{LINEARS[native]}"
                self._draw(prefix, linear.out_features, generator)
                linear.register_forward_hook(self._hook(prefix))
        self.rows = {}
        for name, items in synthetic_rows(spec).items():
            for weight in self.weights.values():
                weight.grad = None
            expected = reference(self.model, items)
            expected.gradients = {name: weight.grad for name, weight in self.weights.items()}
            self.rows[name] = (items, expected)

    def _draw(self, prefix, hidden_size, generator):
        shapes = {"shared": (SIZE, SIZE)}
        for kind in ("image", "text"):
            shapes |= {f"down.{kind}": (SIZE, hidden_size), f"up.{kind}": (hidden_size, SIZE)}
        for name, (outputs, inputs) in shapes.items():
            for suffix, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
                values = torch.randn(shape, generator=generator) / math.sqrt(inputs)
                self.weights[f"{prefix}.{name}.{suffix}"] = values.requires_grad_()

    def _look(self, _model, _arguments, named):
        self.is_visual_S1 = (named["input_ids"][0] == _image_token_id(self.model))[:, None]

    def _hook(self, prefix):
        def part(name, values):
            weight, bias = (self.weights[f"{prefix}.{name}.{suffix}"] for suffix in ("weight", "bias"))
            return F.linear(values, weight, bias)

        def add(_linear, _arguments, output):
            added = []
            for is_visual, token in zip(self.is_visual_S1[:, 0].tolist(), output[0], strict=True):
                kind = "image" if is_visual else "text"
                inner = F.silu(part("shared", F.silu(part(f"down.{kind}", token))))
                added.append(part(f"up.{kind}", inner))
            return output + torch.stack(added)

        return add


def _image_token_id(model):
    config = model.config
    return config.image_token_id if "image_token_id" in config else config.image_token_index


@pytest.fixture(scope="module")
def theirs(model_dirs, workers):
    done = {}

    def make(family):
        if family not in done:
            (spec,) = workers(1).run(cases.input_spec, hf_dir=model_dirs[family])
            done[family] = Theirs(model_dirs[family], spec)
        return done[family]

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_numbers_equal_the_formula(family, layout, model_dirs, theirs, workers):
    expected = theirs(family)
    parallel, recompute = LAYOUTS[layout]
    ranks = workers(2 if parallel else 1).run(
        cross_modal_cases.compare_adapters,
        hf_dir=model_dirs[family],
        peft=PEFT,
        weights={name: weight.detach() for name, weight in expected.weights.items()},
        rows=expected.rows,
        parallel=parallel,
        recompute=recompute,
    )
    figures = {name: max(rank[one][name] for rank in ranks for one in rank) for name in ("logits", "gradients")}
    units = {"logits": "largest difference", "gradients": "relative difference, worst matrix"}
    record(
        "parity",
        [
            row(
                f"cross-modal adapters, {family} {layout}: {name}",
                value,
                unit=units[name],
                required=f"<= {TOLERANCES[name]:g}",
                reference="transformers with the formula as hooks, fp32",
                command="make test TESTS=tests/parity/test_cross_modal.py",
            )
            for name, value in figures.items()
        ],
    )
    assert all(value <= TOLERANCES[name] for name, value in figures.items()), (figures, ranks)
    for one, (_, found) in expected.rows.items():
        learning = [name for name, gradient in found.gradients.items() if gradient is not None and gradient.any()]
        assert {rank[one]["compared"] for rank in ranks} == {len(learning)}
        # without images, and of images behind the last word, adapters of images learn nothing
        assert any(".image." in name for name in learning) == (one not in ("text only", "image last"))

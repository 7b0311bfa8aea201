"""Rates by layer, staged unfreezing and clipping by layer, against transformers' model and torch's own AdamW."""

import math
import re

import pytest
import torch
from safetensors.torch import save_file

from megavlm.config.load import recipe_from_dict
from tests.evidence import record, row
from tests.parity import cases
from tests.parity.reference import load_reference, reference

NUM_STEPS = 6
TOLERANCE = 1e-5
KNOBS = {
    "lr": 1e-3,
    "vit_lr": 5e-4,
    "aligner_lr": 2e-3,
    "min_lr": 1e-4,
    "lr_decay_style": "linear",
    "vit_layer_decay": 0.7,
    "llm_layer_decay": 0.8,
    "unfreeze": "0: projector, vision[-1:]; 0.34: language[2:]; 3: vision; 0.7: language",
    "unfreeze_warmup_iters": 2,
    "clip_grad": 0.3,
    "vit_clip_grad": 0.1,
    "weight_decay": 0.1,
    # Where a gradient is next to nothing, Adam's step is the sign of rounding; this damps it.
    "adam_eps": 1e-4,
}


def place_of(name, num_layers):
    """(component, layer, what is d in decay ** d) by transformers' name."""
    found = re.search(r"(blocks|layers)\.(\d+)\.", name)
    if "visual" in name and "merger" in name:
        return "projector", None, 0
    component = "vision" if "visual" in name else "language"
    if found:
        return component, int(found[2]), num_layers - int(found[2])
    return component, None, num_layers + 1 if "embed" in name else 0


def first_step_of(component, layer):
    """By `unfreeze`, in six steps."""
    if component == "projector":
        return 0
    if component == "vision":
        return 0 if layer == 3 else 3
    return 2 if layer is not None and layer >= 2 else 4


def peaks_of(component):
    return {"vision": 5e-4, "projector": 2e-3, "language": 1e-3}[component]


def train_plainly(model, items, by):
    """The same run in plain torch: a group for each parameter, gradients scaled by hand."""
    named = dict(model.named_parameters())
    places = {name: place_of(name, 4) for name in named}
    groups = [
        {"params": [one], "name": name, "weight_decay": 0.0 if one.dim() <= 1 else KNOBS["weight_decay"]}
        for name, one in named.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=KNOBS["adam_eps"], foreach=False)
    for step in range(NUM_STEPS):
        reference(model, items)  # leaves the gradients of the mean loss
        units = {}
        for name, (component, layer, _) in places.items():
            one = named[name]
            if first_step_of(component, layer) > step or one.grad is None:
                one.grad = None
                continue
            unit = {"total": "", "component": component, "layer": (component, layer)}[by]
            units.setdefault(unit, []).append((component, one))
        for members in units.values():
            norm = math.sqrt(sum(one.grad.double().square().sum().item() for _, one in members))
            for component, one in members:
                limit = KNOBS["vit_clip_grad"] if component == "vision" and by != "total" else KNOBS["clip_grad"]
                one.grad *= min(1.0, limit / (norm + 1e-6))
        for group in optimizer.param_groups:
            component, layer, depth = places[group["name"]]
            peak, first = peaks_of(component), first_step_of(component, layer)
            decay = {"vision": 0.7, "projector": 1.0, "language": 0.8}[component] ** depth
            rate = 1e-4 + (peak - 1e-4) * (1 - step / NUM_STEPS)
            group["lr"] = rate * decay * (min(1.0, (step - first + 1) / 2) if first else 1.0)
        optimizer.step()


@pytest.mark.parametrize("by", ["total", "component", "layer"])
def test_updates_equal_those_of_plain_torch(by, model_dirs, rows_file, workers, tmp_path):
    hf_dir = model_dirs["qwen3_vl"]
    items = workers(1).run(cases.encode_rows, hf_dir=hf_dir, rows_file=rows_file)[0]
    model = load_reference(hf_dir)
    save_file({name: one.detach().clone() for name, one in model.named_parameters()}, tmp_path / "start.safetensors")
    train_plainly(model, items, by)
    save_file({name: one.detach().clone() for name, one in model.named_parameters()}, tmp_path / "end.safetensors")
    optimizer = KNOBS | {"clip_grad_by": by}
    if by == "total":
        optimizer.pop("vit_clip_grad")
    recipe = recipe_from_dict(
        {
            "model": {"hf_dir": str(hf_dir)},
            "data": {"train": [str(rows_file)], "shuffle": False},
            "train": {"train_iters": NUM_STEPS, "precision": "fp32", "global_batch_size": len(items)},
            "optimizer": optimizer,
        }
    )
    (distances,) = workers(1).run(
        "tests.unit.train.learning_cases:updates_against",
        recipe=recipe,
        num_steps=NUM_STEPS,
        start=tmp_path / "start.safetensors",
        end=tmp_path / "end.safetensors",
    )
    worst = max(distances, key=lambda name: distances[name])
    evidence = row(
        f"rates by layer, staged unfreezing, clipping by {by}: updates of {NUM_STEPS} steps",
        distances[worst],
        unit="relative difference, worst parameter",
        required=f"<= {TOLERANCE:g}",
        reference="transformers fp32 and torch.optim.AdamW",
        command="make test TESTS=tests/parity",
    )
    record("parity", [evidence])
    assert len(distances) > 50 and distances[worst] <= TOLERANCE, (worst, distances[worst])

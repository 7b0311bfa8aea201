"""Adapters against the peft package: theirs in our model, ours in theirs; the same logits and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from tests.evidence import record, row
from tests.parity import cases, peft_cases
from tests.parity.cases import TOLERANCES
from tests.parity.reference import load_reference, model_inputs, reference
from tests.parity.rows import synthetic_rows

COMMAND = "make test TESTS=tests/parity/test_peft.py"
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}

# All linears of layers and connectors, by the ends of their names in transformers' modules.
LINEARS = {
    "qwen3_vl": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj qkv attn.proj linear_fc1 linear_fc2",
    "qwen3_vl_moe": "q_proj k_proj v_proj o_proj qkv attn.proj linear_fc1 linear_fc2",
    "qwen2_5_vl": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj qkv attn.proj mlp.0 mlp.2",
    "llava": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj out_proj fc1 fc2 linear_1 linear_2",
    "internvl": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj projection_layer fc1 fc2 linear_1 linear_2",
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

IA3 = ("k_proj", "v_proj", "down_proj", "qkv")

# Kind of adapter: knobs of a recipe, and peft's.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA": ({"lora_rank": 4, "lora_alpha": 8.0}, {"r": 4, "lora_alpha": 8}),
    "rsLoRA": ({"lora_rank": 4, "lora_alpha": 8.0, "use_rslora": True}, {"r": 4, "lora_alpha": 8, "use_rslora": True}),
    "QLoRA": (
        {"lora_rank": 4, "lora_alpha": 8.0, "bnb_4bit_quant_type": "nf4"},
        {"r": 4, "lora_alpha": 8},
    ),
    "IA3": (
        {"tuner_type": "ia3", "target_modules": IA3},
        {"target_modules": list(IA3), "feedforward_modules": ["down_proj"]},
    ),
    "DoRA": ({"lora_rank": 4, "lora_alpha": 8.0, "use_dora": True}, {"r": 4, "lora_alpha": 8, "use_dora": True}),
}
CASES = [
    *((family, "LoRA") for family in LINEARS),
    ("qwen3_vl", "rsLoRA"),
    ("qwen3_vl", "DoRA"),
    ("llava", "DoRA"),
    ("qwen3_vl", "QLoRA"),
    ("qwen3_vl", "IA3"),
    ("qwen2_5_vl", "IA3"),
]


def load_quantised(hf_dir: Path) -> Any:
    """The model with its language model's linears in 4 bits, by bitsandbytes."""
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    model = AutoModelForImageTextToText.from_pretrained(
        hf_dir, attn_implementation="eager", dtype=torch.float32, quantization_config=four_bits, device_map="cpu"
    )
    model.train(False)
    assert isinstance(model.model.language_model.layers[0].self_attn.q_proj, Linear4bit)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.train()  # otherwise it takes kernels for inference in bf16 where the processor has them
    return model


class Theirs:
    """A model with a random adapter of peft's, written to a folder, and what they make of some rows."""

    def __init__(self, hf_dir: Path, folder: Path, family: str, kind: str, spec: Any) -> None:
        config: Any
        if kind == "IA3":
            config = IA3Config(**KINDS[kind][1])
        else:
            config = LoraConfig(target_modules=LINEARS[family].split(), **KINDS[kind][1])
        if family == "qwen3_vl_moe":
            config.target_parameters = EXPERTS
        torch.manual_seed(0)
        model = get_peft_model(load_quantised(hf_dir) if kind == "QLoRA" else load_reference(hf_dir), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name and parameter.ndim > 1:
                    parameter.normal_(std=0.1)
                elif "magnitude" in name or "ia3_l" in name:
                    parameter.mul_(0.75 + 0.5 * torch.rand_like(parameter))
        model.save_pretrained(folder)
        self.items = synthetic_rows(spec)
        self.rows = {name: (items, reference(model, items)) for name, items in self.items.items()}
        gradients = next(iter(self.rows.values()))[1].gradients
        # CLIP's last layer, behind the one that LLaVA reads, has adapters there, without gradients
        learned = [value for name, value in gradients.items() if ".lora_" in name or ".ia3_l" in name]
        self.num_tensors = sum(value is not None for value in learned)
        self.peft = {"tuner_type": "lora", "adapters": str(folder), **KINDS[kind][0]}


@pytest.fixture(scope="module")
def theirs(model_dirs, workers, tmp_path_factory):
    done = {}

    def make(family, kind):
        if (family, kind) not in done:
            (spec,) = workers(1).run(cases.input_spec, hf_dir=model_dirs[family])
            folder = tmp_path_factory.mktemp("adapter")
            done[family, kind] = Theirs(model_dirs[family], folder, family, kind, spec)
        return done[family, kind]

    return make


@pytest.mark.parametrize("layout", [{}, TP2], ids=["TP1", "TP2+SP"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_numbers_equal_peft(family, kind, layout, model_dirs, theirs, workers):
    reference = theirs(family, kind)
    ranks = workers(2 if layout else 1).run(
        peft_cases.compare_adapter, hf_dir=model_dirs[family], peft=reference.peft, rows=reference.rows, parallel=layout
    )
    name = f"{kind}, {family} {'TP2+SP' if layout else 'TP1'}"
    figures = {
        figure: max(rank[row_name][figure] for rank in ranks for row_name in rank) for figure in ("logits", "gradients")
    }
    units = {"logits": "largest difference", "gradients": "relative difference, worst matrix"}
    record(
        "parity",
        [
            row(
                f"{name}: {figure}",
                value,
                unit=units[figure],
                required=f"<= {TOLERANCES[figure]:g}",
                reference="transformers with peft, fp32",
                command=COMMAND,
            )
            for figure, value in figures.items()
        ],
    )
    assert all(value <= TOLERANCES[figure] for figure, value in figures.items()), (figures, ranks)
    for row_name in ranks[0]:
        if row_name not in ("text only", "image last"):
            assert max(rank[row_name]["compared"] for rank in ranks) == reference.num_tensors


MIXED = "vision: lora r=2, projector: full, language[0:2]: lora r=4 alpha=8, language[2:3]: frozen, language[3:]: lora"
FOUR = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}
# Name: family, what is tuned, layout. Where TP4 cuts groups of heads, ranks have different parts of a projection.
TRAINED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mixed": ("qwen3_vl", {"components": MIXED}, FOUR),
    "experts": ("qwen3_vl_moe", {"tuner_type": "lora"}, {"expert_model_parallel_size": 2}),
    "DoRA": (
        "qwen3_vl",
        {"tuner_type": "lora", "use_dora": True, "target_modules": ("q_proj", "down_proj", "qkv")},
        FOUR,
    ),
    "IA3": ("qwen2_5_vl", {"tuner_type": "ia3"}, FOUR),
    "TP4": ("llava", {"tuner_type": "lora", "use_rslora": True}, {"tensor_model_parallel_size": 4}),
}


@pytest.mark.parametrize("case", TRAINED)
def test_peft_and_transformers_load_what_was_trained(case, model_dirs, rows_file, tmp_path, workers):
    family, peft, layout = TRAINED[case]
    hf_dir = model_dirs[family]
    world_size = 2 if family == "qwen3_vl_moe" else 4
    workers(world_size).run(
        peft_cases.train_and_export,
        timeout_s=200,
        hf_dir=hf_dir,
        rows_file=rows_file,
        out_dir=tmp_path,
        peft=peft,
        parallel={**layout, "use_distributed_optimizer": True},
    )
    workers(1).run(peft_cases.export, hf_dir=hf_dir, out_dir=tmp_path)
    (spec,) = workers(1).run(cases.input_spec, hf_dir=hf_dir)
    rows = synthetic_rows(spec)
    adapted = PeftModel.from_pretrained(load_reference(hf_dir), tmp_path / "adapter")
    with_adapter = their_logits(adapted, rows)
    with_merged = their_logits(load_reference(tmp_path / "merged"), rows)
    base = their_logits(load_reference(hf_dir), rows)
    (ours,) = workers(1).run(
        peft_cases.logits_of, hf_dir=hf_dir, rows=rows, peft={**peft, "adapters": str(tmp_path / "adapter")}
    )
    differences = {
        "adapter in peft": max(largest(with_adapter[name], ours[name]) for name in rows),
        "merged in transformers": max(largest(with_merged[name], ours[name]) for name in rows),
    }
    record(
        "parity",
        [
            row(
                f"LoRA trained here, {case}: {name}",
                value,
                unit="largest difference of logits",
                required="<= 1e-5",
                reference="ours, with the exported adapter",
                command=COMMAND,
            )
            for name, value in differences.items()
        ],
    )
    assert all(value <= 1e-5 for value in differences.values()), differences
    assert min(largest(base[name], ours[name]) for name in rows) > 1e-2  # training changed something
    if case == "IA3":  # of all linears those that the paper scales; the tower has one for queries, keys and values
        kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        scaled = {name.split(".")[-2] for name in kept}
        assert {"k_proj", "v_proj", "down_proj", "qkv"} <= scaled and not {"q_proj", "o_proj", "gate_proj"} & scaled


PREFIX = {"components": "vision: frozen, projector: frozen, language: prefix tokens=5"}


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_peft_loads_a_prefix_that_was_trained(family, model_dirs, rows_file, tmp_path, workers):
    """As a cache in front of a row; so Qwen3-VL has to be told its positions, which it would guess otherwise."""
    hf_dir = model_dirs[family]
    parallel = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    words = {"hf_dir": hf_dir, "out_dir": tmp_path}
    workers(4).run(
        peft_cases.train_and_export, timeout_s=200, rows_file=rows_file, peft=PREFIX, parallel=parallel, **words
    )
    workers(1).run(peft_cases.export, merged=False, **words)
    (spec,) = workers(1).run(cases.input_spec, hf_dir=hf_dir)
    rows = synthetic_rows(spec)
    adapted = PeftModel.from_pretrained(load_reference(hf_dir), tmp_path / "adapter")
    theirs = their_logits(adapted, rows, with_positions=family == "qwen3_vl")
    base = their_logits(load_reference(hf_dir), rows)
    trained = PREFIX | {"adapters": str(tmp_path / "adapter")}
    (ours,) = workers(1).run(peft_cases.logits_of, hf_dir=hf_dir, rows=rows, peft=trained)
    difference = max(largest(theirs[name], ours[name]) for name in rows)
    record(
        "parity",
        [
            row(
                f"prefix trained here, {family}: adapter in peft",
                difference,
                unit="largest difference of logits",
                required="<= 1e-5",
                reference="ours, with the exported adapter",
                command=COMMAND,
            )
        ],
    )
    assert difference <= 1e-5
    assert min(largest(base[name], ours[name]) for name in rows) > 1e-2


def test_adapters_can_be_switched_off_and_merged(model_dirs, theirs, workers):
    reference = theirs("qwen3_vl", "LoRA")
    rows = {name: reference.items[name] for name in list(reference.items)[:2]}
    hf_dir = model_dirs["qwen3_vl"]
    (adapted,) = workers(1).run(peft_cases.logits_of, hf_dir=hf_dir, rows=rows, peft=reference.peft)
    (merged,) = workers(1).run(peft_cases.logits_of, hf_dir=hf_dir, rows=rows, peft=reference.peft, how="merged")
    (disabled,) = workers(1).run(peft_cases.logits_of, hf_dir=hf_dir, rows=rows, peft=reference.peft, how="disabled")
    (base,) = workers(1).run(peft_cases.logits_of, hf_dir=hf_dir, rows=rows)
    for name in rows:
        assert torch.equal(disabled[name], base[name])
        assert 0 < largest(adapted[name], merged[name]) <= 1e-5
        assert largest(adapted[name], base[name]) > 1e-1


@torch.no_grad()
def their_logits(model, rows, with_positions=False):
    def logits(item):
        arguments = model_inputs(model, item)
        if with_positions:
            arguments["position_ids"] = torch.from_numpy(item.encoded.position_ids_3S)[:, None]
        return model(**arguments).logits[0].float()

    return {name: torch.cat([logits(item) for item in items]) for name, items in rows.items()}


def largest(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()

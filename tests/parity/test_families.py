"""Every family against transformers: the same weights and inputs, in every layout the same numbers."""

import pytest
import torch

from tests.evidence import record, row
from tests.parity import cases
from tests.parity.cases import BF16_LOGITS, TOLERANCES
from tests.parity.conftest import CONVERSATIONS, WRITERS
from tests.parity.reference import load_reference, processor_inputs, reference
from tests.parity.rows import ANYRES_ROWS, DYNAMIC_ROWS, SQUARE_ROWS, TILE_ROWS, synthetic_rows

pytestmark = pytest.mark.next_core

COMMAND = "make test TESTS=tests/parity"
LAYOUTS = {"TP1": {}, "TP2+SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}
ROWS = {
    "qwen3_vl": DYNAMIC_ROWS,
    "qwen3_vl_moe": DYNAMIC_ROWS,
    "llava": SQUARE_ROWS,
    "llava_next": ANYRES_ROWS,
    "llava_onevision": ANYRES_ROWS,
    "qwen2_5_vl": DYNAMIC_ROWS,
    "internvl": TILE_ROWS,
    "internvl_6b": TILE_ROWS,
}
UNITS = {
    "logits": "largest difference",
    "loss": "relative difference",
    "gradients": "relative difference, worst parameter",
    "tower": "largest difference / largest value",
    "features": "largest difference / largest value",
    "deepstack": "largest difference / largest value",
}


@pytest.fixture(scope="module")
def references(model_dirs, workers):
    """Rows of each family, with what transformers makes of them."""
    result = {}
    for family, hf_dir in model_dirs.items():
        model = load_reference(hf_dir)
        rows = synthetic_rows(workers(1).run(cases.input_spec, hf_dir=hf_dir)[0])
        result[family] = {name: (items, reference(model, items)) for name, items in rows.items()}
    return result


@pytest.fixture(scope="module")
def measured(model_dirs, references, workers):
    """Figures of (family, layout), measured once: worst over the ranks, by row."""
    done = {}

    def measure(family, layout):
        if (family, layout) not in done:
            parallel = LAYOUTS[layout]
            size = parallel.get("tensor_model_parallel_size", 1)
            ranks = workers(size).run(
                cases.compare, hf_dir=model_dirs[family], rows=references[family], parallel=parallel
            )
            done[family, layout] = {name: [rank[name] for rank in ranks] for name in ranks[0]}
            write_evidence(family, layout, done[family, layout])
        return done[family, layout]

    return measure


def worst(ranks, figure):
    return max(rank[figure] for rank in ranks)


def write_evidence(family, layout, by_row):
    rows = []
    for name, ranks in by_row.items():
        for figure in ("logits", "gradients"):
            rows.append(evidence_row(f"{family} {layout}: {figure}, {name}", figure, worst(ranks, figure)))
    for figure in ("loss", "tower", "features", "deepstack"):
        values = [worst(ranks, figure) for ranks in by_row.values() if figure in ranks[0]]
        if values:
            rows.append(evidence_row(f"{family} {layout}: {figure}, worst row", figure, max(values)))
    record("parity", rows)


def evidence_row(name, figure, value):
    return row(
        name,
        value,
        unit=UNITS[figure],
        required=f"<= {TOLERANCES[figure]:g}",
        reference="transformers fp32",
        command=COMMAND,
    )


CASES = [(family, layout, name) for family in WRITERS for layout in LAYOUTS for name in ROWS[family]]


@pytest.mark.parametrize(("family", "layout", "name"), CASES)
def test_numbers_equal_transformers(family, layout, name, measured):
    ranks = measured(family, layout)[name]
    for figure, tolerance in TOLERANCES.items():
        if figure in ranks[0]:
            assert worst(ranks, figure) <= tolerance, (figure, ranks)
    figures = {"logits", "loss", "gradients"}
    if name != "text only":
        figures |= {"tower", "features"} | ({"deepstack"} if family.startswith("qwen3_vl") else set())
    assert figures <= set(ranks[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", WRITERS)
def test_every_parameter_is_compared(family, layout, measured):
    """All but those without gradient on both sides: CLIP's layers behind the one that LLaVA reads, and the encoder in
    rows where nothing depends on an image."""
    num_unused = {"llava": 18, "llava_next": 18, "llava_onevision": 2}.get(family, 0)
    for name, ranks in measured(family, layout).items():
        for rank in ranks:
            unused = rank["unused here"]
            assert len(unused) == num_unused and all(parameter.startswith("vision.unused.") for parameter in unused)
            without = rank["unused there"] + rank["zero"]
            assert rank["compared"] + len(without) == rank["entries"]
            if name in ("text only", "image last"):
                assert {parameter.split(".")[0] for parameter in without} == {"vision", "projector"}
            else:
                assert without == unused


@pytest.mark.parametrize("family", WRITERS)
def test_bf16_logits(family, tmp_path, workers):
    hf_dir = WRITERS[family](tmp_path / "model", dtype=torch.bfloat16)
    model, exact = load_reference(hf_dir, torch.bfloat16), load_reference(hf_dir)
    rows, theirs = {}, []
    for name, items in synthetic_rows(workers(1).run(cases.input_spec, hf_dir=hf_dir)[0]).items():
        rows[name] = (items, reference(model, items))
        theirs.append((rows[name][1].logits_TY - reference(exact, items).logits_TY).abs().max().item())
    ours = workers(1).run(cases.compare, hf_dir=hf_dir, rows=rows, parallel={}, precision="bf16")[0]
    value = max(figures["logits"] for figures in ours.values())
    evidence = row(
        f"{family} TP1 bf16: logits, worst row",
        value,
        unit=UNITS["logits"],
        required=f"<= {BF16_LOGITS:g}",
        reference="transformers bf16 (its own difference from fp32)",
        reference_value=max(theirs),
        command=COMMAND,
    )
    record("parity", [evidence])
    assert 0 < value <= BF16_LOGITS, ours


@pytest.mark.parametrize("family", WRITERS)
def test_real_images_through_the_data_room(family, model_dirs, rows_file, workers):
    """Files to logits and gradients: our reader, template, tokenizer, image code and packing; and transformers' own."""
    hf_dir = model_dirs[family]
    items = workers(1).run(cases.encode_rows, hf_dir=hf_dir, rows_file=rows_file)[0]
    inputs = [conversation_inputs(hf_dir, rows_file, number) for number in range(len(CONVERSATIONS))]
    assert any(item.encoded.loss_weights_S().any() for item in items)
    for item, arguments in zip(items, inputs, strict=True):
        assert item.encoded.tokens_S.tolist() == arguments["input_ids"][0].tolist()
    expected = reference(load_reference(hf_dir), items, inputs)
    for layout, parallel in LAYOUTS.items():
        size = parallel.get("tensor_model_parallel_size", 1)
        ranks = workers(size).run(cases.compare, hf_dir=hf_dir, rows={"real": (items, expected)}, parallel=parallel)
        figures = {figure: max(rank["real"][figure] for rank in ranks) for figure in ("logits", "gradients")}
        names = {figure: f"{family} {layout}: {figure}, real images from files" for figure in figures}
        record("parity", [evidence_row(names[figure], figure, value) for figure, value in figures.items()])
        assert all(value <= TOLERANCES[figure] for figure, value in figures.items()), figures


def conversation_inputs(hf_dir, rows_file, number):
    question, answer, sizes = CONVERSATIONS[number]
    messages = [
        {"role": "user", "content": [{"type": "image"}] * len(sizes) + [{"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    images = [rows_file.parent / f"{number}-{image}.png" for image in range(len(sizes))]
    return processor_inputs(hf_dir, messages, images)

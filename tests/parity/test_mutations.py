"""The comparison itself is tested: each mistake made on purpose must be far outside its tolerances."""

import pytest

from tests.evidence import record, row
from tests.parity import cases
from tests.parity.cases import TOLERANCES
from tests.parity.reference import load_reference, reference
from tests.parity.rows import synthetic_rows
from tests.parity.test_families import COMMAND, UNITS

CLEAR = 10.0
"""How many times its tolerance an error must be to count as seen."""

MODEL_MUTATIONS = [
    ("qwen3_vl", "DeepStack one layer late"),
    ("qwen3_vl", "chunked MRoPE"),
    ("qwen3_vl", "erf for tanh GELU in the tower"),
    ("qwen3_vl", "plain q/k/v concatenation, vision"),
    ("qwen3_vl", "RMSNorm epsilon 1e-5 for 1e-6"),
    ("qwen2_5_vl", "interleaved MRoPE"),
    ("qwen2_5_vl", "full attention in every layer of the tower"),
    ("qwen2_5_vl", "windows in every layer of the tower"),
    ("qwen2_5_vl", "windows' order not undone"),
    ("qwen3_vl_moe", "experts' weights do not add up to 1"),
    ("qwen3_vl_moe", "experts' gate and up swapped"),
    ("llava_next", "tiles not joined line by line"),
    ("llava_next", "padding of tiles kept in place"),
    ("llava_onevision", "joined tiles shrunk by nearest neighbours"),
    ("internvl", "no LayerScale"),
    ("internvl", "pixel shuffle column by column"),
    ("internvl_6b", "query and key normalised head by head"),
    ("internvl_6b", "norms of query and key swapped"),
    ("llava", "erf for quick GELU"),
    *[
        (family, name)
        for family in ("qwen3_vl", "llava", "qwen2_5_vl", "internvl")
        for name in (
            "gate and up swapped",
            "all images one attention segment",
            "packed row one attention segment",
            "tanh for erf GELU in the connector",
            "plain q/k/v concatenation, language",
            "causal vision tower",
            "no loss mask",
        )
    ],
]
# Name, data ranks, samples to a microbatch.
STEP_MUTATIONS = [
    ("no loss mask", 1, 2),
    ("microbatches divided one by one", 1, 1),
    ("microbatches divided one by one", 2, 2),
    ("local token count", 2, 1),
]


@pytest.fixture(scope="module")
def mixed_rows(model_dirs, workers):
    """The richest packed row of each family, with what transformers makes of it."""
    result = {}
    for family, hf_dir in model_dirs.items():
        items = synthetic_rows(workers(1).run(cases.input_spec, hf_dir=hf_dir)[0])["mixed"]
        result[family] = {"mixed": (items, reference(load_reference(hf_dir), items))}
    return result


@pytest.fixture(scope="module")
def step_reference(model_dirs, rows_file, workers):
    """Loss and gradients of all rows by transformers, divided once."""
    hf_dir = model_dirs["qwen3_vl"]
    items = workers(1).run(cases.encode_rows, hf_dir=hf_dir, rows_file=rows_file)[0]
    counts = [float(item.encoded.loss_weights_S().sum()) for item in items]
    assert len(set(counts)) == len(counts) and min(counts) > 0, "unequal counts, or the division would not matter"
    return reference(load_reference(hf_dir), items)


def times_tolerance(measured):
    """The figure that stands out most, and by how much."""
    figures = {name: measured[name] / tolerance for name, tolerance in TOLERANCES.items() if name in measured}
    worst = max(figures, key=figures.__getitem__)
    return worst, figures[worst]


def judge(name, sound, broken):
    """The same check twice; what it said of either goes on record."""
    passes, fails = (
        max((times_tolerance(rank) for rank in ranks), key=lambda pair: pair[1]) for ranks in (sound, broken)
    )
    figure = fails[0]
    record(
        "parity",
        [
            row(
                f"mistake caught: {name}",
                max(rank[figure] for rank in broken),
                unit=f"{figure}: {UNITS[figure]}",
                required=f"> {CLEAR * TOLERANCES[figure]:g}",
                reference="without the mistake",
                reference_value=max(rank[figure] for rank in sound),
                command=COMMAND,
            )
        ],
    )
    assert passes[1] <= 1.0, f"without the mistake: {passes}"
    assert fails[1] > CLEAR, f"not seen clearly: {fails}"


@pytest.mark.parametrize(("family", "name"), MODEL_MUTATIONS)
def test_a_mistake_in_the_model_is_seen(family, name, model_dirs, mixed_rows, workers):
    arguments = {"hf_dir": model_dirs[family], "rows": mixed_rows[family], "parallel": {}}
    sound, broken = (
        [rank["mixed"] for rank in workers(1).run(cases.compare, broken=mistake, **arguments)] for mistake in ("", name)
    )
    judge(f"{family}, {name}", sound, broken)


@pytest.mark.parametrize(("name", "num_ranks", "micro_batch_size"), STEP_MUTATIONS)
def test_a_mistake_in_the_step_is_seen(
    name, num_ranks, micro_batch_size, model_dirs, rows_file, step_reference, workers
):
    arguments = {
        "hf_dir": model_dirs["qwen3_vl"],
        "rows_file": rows_file,
        "expected": step_reference,
        "micro_batch_size": micro_batch_size,
    }
    sound, broken = (
        workers(num_ranks).run(cases.train_step_against, broken=mistake, **arguments) for mistake in ("", name)
    )
    judge(f"training step DP{num_ranks}, {micro_batch_size} samples a microbatch, {name}", sound, broken)


def test_every_mistake_is_tried():
    from tests.parity.mutations import MUTATIONS

    assert set(MUTATIONS) == {name for _, name in MODEL_MUTATIONS} | {name for name, *_ in STEP_MUTATIONS}

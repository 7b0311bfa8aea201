import json
import subprocess
import sys

import pytest

from megavlm.config.layout import layers_per_stage, parse_pipeline_layout
from megavlm.config.schema import ParallelConfig
from megavlm.errors import UseError

VALID = {
    "EttL": (2,),
    "Et|tL": (1, 1),
    "Et*3|(tt|)*2,tL": (3, 2, 2, 1),
    "E|t|t|L": (0, 1, 1, 0),
    "Ettt|(tt|)*29,L": (3, *([2] * 29), 0),
    "E(t|)*3L": (1, 1, 1, 0),
    "E(t*2|)*2tL": (2, 2, 1),
    "E,t|*1t,L": (1, 1),
    "Et*12|t*12L": (12, 12),
}


@pytest.mark.parametrize(("text", "counts"), VALID.items())
def test_counts_layers(text: str, counts: tuple[int, ...]) -> None:
    assert parse_pipeline_layout(text, sum(counts), len(counts)) == counts
    assert parse_pipeline_layout(text, None, len(counts)) == counts


def test_agrees_with_megatron() -> None:
    """In a process of its own: Megatron must not be imported here before the platform is set up."""
    code = """
import json, sys
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout as Layout
texts = json.loads(sys.argv[1])
print(json.dumps([[stage.count(LayerType.decoder) for stage in Layout.parse_str_to_list(t)] for t in texts]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, json.dumps(list(VALID))],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [tuple(counts) for counts in json.loads(done.stdout.splitlines()[-1])] == list(VALID.values())


@pytest.mark.parametrize(
    ("text", "num_layers", "num_stages", "part"),
    [
        ("Et|tL", 2, 4, "got 2 stages; expected 4"),
        ("Et|tL", 3, 2, "got 2 decoder layers (1, 1); expected the model's 3"),
        ("t|tL", 2, 2, "got 0 `E`"),
        ("tE|tL", 2, 2, "at the very start"),
        ("E|EtL", 1, 2, "got 2 `E`"),
        ("Et|t", 2, 2, "got 0 `L`"),
        ("EtL|t", 2, 2, "at the very end"),
        ("Et||tL", 2, 3, "nothing in stage 1"),
        ("Et|mL", 1, 2, "multi-token prediction"),
        ("Et|xL", 1, 2, "'x'"),
        ("Et | tL", 2, 2, "' '"),
        ("E((t|)*2)*2L", 4, 5, "groups do not nest"),
        ("Et*|tL", 2, 2, "'*'"),
        ("Et*0|tL", 1, 2, "`*0`"),
        ("E(t*9999|)*9999L", None, 2, "check the numbers after `*`"),
        ("Et*999999999L", None, 1, "check the numbers after `*`"),
    ],
)
def test_says_what_is_wrong(text: str, num_layers: int | None, num_stages: int, part: str) -> None:
    with pytest.raises(UseError) as caught:
        parse_pipeline_layout(text, num_layers, num_stages)
    assert part in str(caught.value)
    assert f"`{text}`" in str(caught.value)


def test_even_split_and_layout() -> None:
    interleaved = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    assert layers_per_stage(ParallelConfig(), 5) == (5,)
    assert layers_per_stage(interleaved, 8) == (2, 2, 2, 2)
    uneven = ParallelConfig(pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Et|tttL")
    assert layers_per_stage(uneven, 4) == (1, 3)
    with pytest.raises(UseError, match="the model's 5"):
        layers_per_stage(uneven, 5)


@pytest.mark.parametrize(("num_layers", "num_stages"), [(5, 2), (7, 3), (3, 4), (2, 4), (9, 4)])
def test_uneven_split_is_refused_with_a_layout_that_works(num_layers: int, num_stages: int) -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=num_stages)
    with pytest.raises(UseError, match=f"{num_stages} stages") as caught:
        layers_per_stage(parallel, num_layers)
    example = str(caught.value).rsplit("e.g. ", 1)[1]
    assert sum(parse_pipeline_layout(example, num_layers, num_stages)) == num_layers


def test_too_many_stages() -> None:
    with pytest.raises(UseError, match="at most 4 stages"):
        layers_per_stage(ParallelConfig(pipeline_model_parallel_size=8), 2)

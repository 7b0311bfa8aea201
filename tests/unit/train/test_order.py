"""From rows and a recipe to the order of samples: groups (`data.group_by`), alone and in mixtures."""

import logging

import numpy as np
import pytest

from megavlm.config.mixture_knobs import CurriculumPhase, MixtureSource
from megavlm.config.schema import DataConfig, Recipe, TrainConfig
from megavlm.data.dataset import Dataset
from megavlm.data.encode import open_encoder
from megavlm.data.index_files import build_index
from megavlm.data.row_options import row_options
from megavlm.data.rows import Rows
from megavlm.errors import UseError
from megavlm.train.order import build_plan
from tests.tiny import write_tiny_qwen3vl
from tests.unit.data.conftest import QWEN_INPUTS, write_jsonl

MAX_LENGTH = 60


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return open_encoder(write_tiny_qwen3vl(tmp_path_factory.mktemp("model")), QWEN_INPUTS, MAX_LENGTH)


def answered(prompt, num_words, **columns):
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red " * num_words + "square"}]
    return {"messages": turns, "prompt_id": prompt, **columns}


def plan_of(folder, encoder, files, *, dp_size=1, step_rows=6, **knobs):
    """The plan of rows in files (sources, where there are several), and the prompts of the rows that are left."""
    paths = [str(write_jsonl(folder / f"{number}.jsonl", rows)) for number, rows in enumerate(files)]
    sources = tuple(MixtureSource(name=f"source {number}", paths=(path,)) for number, path in enumerate(paths))
    data = DataConfig(**({"mixture": sources} if len(files) > 1 else {"train": tuple(paths)}), **knobs)
    recipe = Recipe(data=data, train=TrainConfig(global_batch_size=step_rows, micro_batch_size=2, train_iters=20))
    rows = Rows.open(paths, row_options(data))
    train_set = Dataset(rows, encoder)
    train_set.adopt(build_index(folder / "index", rows, encoder))
    firsts = np.cumsum((0, *map(len, files)))
    sizes = np.diff(np.searchsorted(train_set.index.kept_N, firsts)).tolist()
    plan = build_plan(recipe, train_set, sizes, dp_size=dp_size, costs=None, microbatches_multiple=1)
    return plan, [rows[int(row)].group for row in train_set.index.kept_N]


def groups_drawn(plan, prompts, step, dp_size=1):
    """The prompt of each microbatch of two rows, which must be one."""
    found = []
    for rank in range(dp_size):
        for microbatch in plan.microbatches(step, rank):
            (prompt,) = {prompts[index] for index in microbatch}
            assert len(set(microbatch)) == 2
            found.append(prompt)
    return found


@pytest.mark.parametrize("dp_size", [1, 3])
def test_rows_of_a_prompt_are_a_microbatch(dp_size, tmp_path, encoder):
    rows = [answered(f"p{number % 7}", number) for number in range(14)]
    plan, prompts = plan_of(tmp_path, encoder, [rows], dp_size=dp_size, group_by="prompt_id")
    drawn = [prompt for step in range(7) for prompt in groups_drawn(plan, prompts, step, dp_size)]
    assert len(drawn) == 21 and all(drawn.count(prompt) == 3 for prompt in set(drawn)) and len(set(drawn)) == 7
    assert plan.num_steps(3) == 7


def test_groups_of_another_size_end_the_run_or_are_left_out(tmp_path, encoder, caplog):
    """One row of group 2 is too long: what is left of its group goes too."""
    rows = [answered(number // 2, 500 if number == 5 else number) for number in range(10)]
    with pytest.raises(UseError, match=r"data.group_by.*between 1 and 2 rows.*begins with row 4.*data.on_error=skip"):
        plan_of(tmp_path, encoder, [rows], group_by="prompt_id")
    with caplog.at_level(logging.INFO, logger="megavlm.train.order"):
        plan, prompts = plan_of(tmp_path, encoder, [rows], group_by="prompt_id", on_error="skip", step_rows=8)
    assert sorted(groups_drawn(plan, prompts, 0)) == ["0", "1", "3", "4"]
    assert "left out 1 rows" in caplog.text and "0.jsonl:5" in caplog.text


def test_sources_have_groups_of_their_own(tmp_path, encoder):
    """The same prompts in two sources are no groups of four; shares and lengths are those of groups."""
    files = [[answered(f"p{number // 2}", number) for number in range(size)] for size in (8, 12)]
    curriculum = (CurriculumPhase(max_length=24), CurriculumPhase(start_fraction=0.5))
    plan, prompts = plan_of(tmp_path, encoder, files, group_by="prompt_id", step_rows=4, curriculum=curriculum)
    assert plan.mixture is not None and plan.mixture.num_samples == 10
    for step in range(20):
        groups_drawn(plan, prompts, step)
        sources = [index >= 8 for index in plan.global_batch_indices(step)]
        assert sources.count(True) == sources.count(False) == 2, "each source has its half"
    longest = plan.mixture._lengths_N
    assert plan.groups is not None and len(longest) == 10
    early = {int(index) for step in range(10) for index in plan.global_batch_indices(step)}
    late = {int(index) for step in range(10, 20) for index in plan.global_batch_indices(step)}
    assert (
        max(longest[plan.groups.group_of_N[index]] for index in early)
        <= 24
        < max(longest[plan.groups.group_of_N[index]] for index in late)
    )


def test_rows_must_name_their_group(tmp_path, encoder):
    rows = [answered("p", 1), {key: value for key, value in answered("p", 2).items() if key != "prompt_id"}]
    with pytest.raises(UseError, match=r"no row left|None as prompt_id"):
        plan_of(tmp_path, encoder, [rows[1:]], group_by="prompt_id")
    for wrong in (None, "", [1], 1.5):
        path = write_jsonl(tmp_path / "wrong.jsonl", [answered(wrong, 1)])
        with pytest.raises(UseError, match=r"wrong.jsonl row 1: got .* as prompt_id; expected words or a whole number"):
            Rows.open([str(path)], row_options(DataConfig(group_by="prompt_id")))[0]

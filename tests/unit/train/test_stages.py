"""Stages without a model: which tokens speak for a sequence, what counts, and names that must agree."""

import dataclasses

import pytest
import torch

from megavlm.config.objectives import COMPARING_STAGES, PAIR_LOSS_TYPES, REFERENCE_STAGES
from megavlm.config.schema import TrainConfig
from megavlm.config.stage_knobs import WORDLESS_STAGES
from megavlm.data.sample import Batch
from megavlm.losses.preference import PAIR_LOSSES
from megavlm.losses.reference_free import REFERENCE_FREE_LOSSES
from megavlm.train.stages.preference import answer_lengths
from megavlm.train.stages.registry import STAGES
from megavlm.train.stages.reward import scored_tokens
from megavlm.train.stages.sequences import counting_samples, last_wanted_tokens


@pytest.fixture
def batch():
    """Two pairs: sequences of 5, 3, 4 and 6 tokens, padded to multiples of 4, and a segment of padding."""
    borders = [0, 8, 12, 16, 24, 28]
    lengths = [5, 3, 4, 6]
    total = borders[-1]
    real_T, weights_T = torch.zeros(total, dtype=torch.bool), torch.zeros(total)
    for start, length in zip(borders, lengths, strict=False):
        real_T[start : start + length] = True
        # the last two tokens but one are learned, by the token before each
        weights_T[start + length - 3 : start + length - 1] = 0.5
        weights_T[start + length - 2] = 0 if length == 6 else 0.5
    return Batch(
        tokens_T=torch.arange(total),
        labels_T=torch.zeros(total, dtype=torch.int64),
        loss_weights_T=weights_T,
        position_ids_3T=torch.zeros(3, total, dtype=torch.int64),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        real_T=real_T,
        patches_PC=torch.zeros(0, 1),
        grid_thw_N3=torch.zeros(0, 3, dtype=torch.int64),
        sample_ids=("a", "b"),
        num_real_tokens=sum(lengths),
        num_parts=2,
    )


def test_the_last_token_of_a_sequence_is_not_its_padding(batch):
    assert scored_tokens(batch, "last_token").tolist() == [4, 10, 15, 21]
    assert last_wanted_tokens(batch.real_T, batch).tolist() == [4, 10, 15, 21]


def test_the_end_of_an_answer_is_the_last_token_that_is_learned(batch):
    assert scored_tokens(batch, "end_of_answer").tolist() == [4, 10, 15, 20]


def test_lengths_count_tokens_with_a_weight(batch):
    assert answer_lengths(batch).tolist() == [2, 2, 2, 1]


def test_a_row_that_fills_up_a_round_counts_nothing(batch):
    assert counting_samples(batch).tolist() == [0, 1]
    filler = dataclasses.replace(
        batch, real_T=torch.zeros_like(batch.real_T), loss_weights_T=torch.zeros_like(batch.loss_weights_T)
    )
    assert counting_samples(filler).tolist() == []
    assert len(scored_tokens(filler, "last_token")) == len(scored_tokens(filler, "end_of_answer")) == 4


def test_the_recipe_knows_the_stages_and_their_losses():
    assert set(TrainConfig.__dataclass_fields__["stage"].type.__args__) == set(STAGES)
    assert set(COMPARING_STAGES) == {name for name, kind in STAGES.items() if kind.row_kind != "conversation"}
    assert set(REFERENCE_STAGES) == {name for name, kind in STAGES.items() if kind.needs_reference}
    assert set(PAIR_LOSS_TYPES["dpo"]) == set(PAIR_LOSSES) - {"aot", "aot_unpaired"}
    assert {name for name, kind in STAGES.items() if kind.head != "words"} == set(WORDLESS_STAGES)
    assert set(PAIR_LOSS_TYPES) - {"dpo", "kto"} == set(REFERENCE_FREE_LOSSES)

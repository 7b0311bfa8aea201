import itertools

import numpy as np
import pytest

from megavlm.config.schema import DataConfig, TokenWeightPhase, TokenWeights
from megavlm.data.encode import SampleEncoder
from megavlm.data.examine import examine
from megavlm.data.images import read_image_spec
from megavlm.data.packing import pack
from megavlm.data.sample import Box, Sample, Turn
from megavlm.data.spans import box_spans, entity_spans
from megavlm.data.token_weights import (
    BOX,
    ENTITY,
    INSTRUCTION,
    READ,
    RESPONSE,
    SPECIAL,
    TokenSchedule,
    loss_weights,
    token_schedule,
)
from megavlm.data.tokens import Tokenizer
from tests.unit.data.conftest import QWEN_INPUTS, draw_image

ALL = TokenWeights(special=1, instruction=1, response=1)


def open_encoder(qwen_dir, schedule):
    tokenizer = Tokenizer(qwen_dir, QWEN_INPUTS.image_token_id, reads_prompts=schedule.reads_prompts)
    return SampleEncoder(
        QWEN_INPUTS, read_image_spec(qwen_dir, QWEN_INPUTS), tokenizer, 512, box_format="numbers", schedule=schedule
    )


def test_weights_of_kinds():
    classes = np.array([READ, SPECIAL, INSTRUCTION, RESPONSE, BOX, ENTITY, RESPONSE], dtype=np.int8)
    scales = np.array([1, 1, 0.5, 1, 2, 1, 0], dtype=np.float32)
    assert loss_weights(classes, scales).tolist() == [0, 0, 0, 1, 2, 1, 0]
    weights = TokenWeights(special=0.25, instruction=0.5, response=1, box=2, entity=0.5)
    found = loss_weights(classes, scales, weights)
    assert found.dtype == np.float32 and found.tolist() == [0, 0.25, 0.25, 1, 6, 1.5, 0]


def test_the_phase_of_a_step():
    phases = (
        TokenWeightPhase(instruction=1),
        TokenWeightPhase(0, 0.5, from_progress=0.3),
        TokenWeightPhase(from_progress=0.5),
    )
    schedule = token_schedule(DataConfig(token_weight_schedule=phases))
    seen = [schedule.at(step, 10).instruction for step in range(10)]
    assert seen == [1, 1, 1, 0.5, 0.5, 0, 0, 0, 0, 0]
    assert schedule.last == TokenWeights() and schedule.reads_prompts
    constant = token_schedule(DataConfig(token_weights=TokenWeights(box=2)))
    assert constant.at(7, 10) == constant.last == TokenWeights(box=2) and not constant.reads_prompts


@pytest.fixture
def boxed():
    answer = (
        "the <ref>fox</ref> at <box>[[1, 2, 3, 4]]</box>, the <ref-object> <|box_start|>(1,2),(3,4)<|box_end|>, "
        "a lazy fox [10, 20.5, -3, 4] not [1, 2] and a square box, a dogma in <bbox>"
    )
    return Sample(
        "x:1",
        (Turn("user", "the dog at [1, 2, 3, 4]?"), Turn("assistant", answer, loss_scale=2.0)),
        boxes=(Box("dog", (5.0, 6.0, 7.0, 8.0)),),
        extra={"entities": ["square box", "the"]},
        weight=0.5,
    )


def test_coordinates_and_names_are_told_in_answers(qwen_dir, boxed):
    encoder = open_encoder(qwen_dir, TokenSchedule())
    encoded = encoder.encode(boxed)

    def stretches(kind):
        is_kind = encoded.token_classes_S == kind
        edges = np.flatnonzero(np.diff(is_kind.astype(int), prepend=0, append=0)).reshape(-1, 2)
        return [encoder.tokenizer.decode(encoded.tokens_S[slice(*edge)]).strip() for edge in edges]

    boxes = stretches(BOX)
    assert len(boxes) == 4
    assert "[[1, 2, 3, 4]]" in boxes[0] and "(1,2),(3,4)" in boxes[1] and boxes[2] == "[10, 20.5, -3, 4]"
    assert boxes[3].startswith("[5") and boxes[3].endswith("]")
    names = [name.strip("<>") for name in stretches(ENTITY)]
    assert names == ["the", "fox", "the dog", "square box"] or names == ["the", "fox", "the", "dog", "square box"]
    # By default nothing of that weighs otherwise; the turn's scale and the row's weight do.
    plain = encoded.loss_weights_S()
    assert set(plain.tolist()) == {0.0, 1.0}
    assert (plain > 0).tolist() == (encoded.token_classes_S >= RESPONSE).tolist()
    heavy = encoded.loss_weights_S(TokenWeights(box=3))
    assert set(heavy[encoded.token_classes_S == BOX].tolist()) == {4.0}
    assert set(heavy[encoded.token_classes_S == ENTITY].tolist()) == {1.0}


def test_points_and_lists_of_other_lengths():
    text = '{"point_2d": [3, 4], "label": "x"} [1, 2] [1, 2, 3] [1, 2, 3, 4, 5] [1,2,3,4]'
    assert [text[slice(*span)] for span in box_spans(text, [(0, len(text))])] == ["[3, 4]", "[1,2,3,4]"]
    assert box_spans(text, [(0, 14)]) == []


def test_cells_of_a_grid_and_their_names():
    cells = "<object><patch_index_0044><patch_index_0863></object>"
    text = f"<phrase>a cat</phrase>{cells} sits"
    whole = [(0, len(text))]
    assert [text[slice(*span)] for span in box_spans(text, whole)] == [cells]
    assert [text[slice(*span)] for span in entity_spans(text, whole, ())] == ["a cat"]


def test_images_are_never_learned(qwen_dir, tmp_path):
    encoder = open_encoder(qwen_dir, TokenSchedule(((0.0, ALL),)))
    sample = Sample(
        "x:1", (Turn("user", "<image>what?"), Turn("assistant", "red")), (str(draw_image(tmp_path / "a.png")),)
    )
    encoded = encoder.encode(sample)
    is_image = encoded.tokens_S == QWEN_INPUTS.image_token_id
    assert is_image.sum() == 4
    assert encoded.loss_weights_S(ALL).tolist() == (~is_image).astype(float).tolist()


def test_packing_takes_the_weights_of_its_step(qwen_dir, boxed):
    encoder = open_encoder(qwen_dir, TokenSchedule(((0.0, ALL), (0.5, TokenWeights()))))
    encoded = encoder.encode(boxed)

    def packed(weights):
        sizes = {"sample_multiple": 1, "total_multiple": 1, "pad_token_id": 0, "patch_channels": 3}
        return pack([encoded], None, token_weights=weights, **sizes).loss_weights_T.numpy()

    for weights in (ALL, TokenWeights(), TokenWeights(special=0.25, entity=5)):
        assert packed(weights)[:-1].tolist() == encoded.loss_weights_S(weights)[1:].tolist()
    assert packed(ALL).sum() > packed(TokenWeights()).sum() > 0


def test_nothing_to_learn_is_judged_by_all_phases(qwen_dir):
    rows = [
        Sample("x:1", (Turn("user", "hi"), Turn("assistant", "red", loss=False))),
        Sample("x:2", (Turn("user", "hi"), Turn("assistant", "red"))),
        Sample("x:3", (Turn("user", "hi"), Turn("assistant", "red")), weight=0.0),
    ]
    kept = {}
    for name, phases in {
        "answers": [TokenWeights()],
        "questions first": [TokenWeights(instruction=1), TokenWeights()],
        "boxes": [TokenWeights(response=0, box=1)],
    }.items():
        schedule = TokenSchedule(tuple((number / 2, weights) for number, weights in enumerate(phases)))
        part = examine(rows, open_encoder(qwen_dir, schedule), range(3))
        kept[name] = (part.reasons_R == 0).tolist()
    assert kept == {
        "answers": [False, True, False],
        "questions first": [True, True, False],
        "boxes": [False, False, False],
    }


def test_an_index_belongs_to_its_weights_template_and_rule(qwen_dir):
    encoder = open_encoder(qwen_dir, TokenSchedule())
    others = [
        open_encoder(qwen_dir, TokenSchedule(((0.0, TokenWeights(box=1)),))),
        open_encoder(qwen_dir, TokenSchedule(((0.0, ALL),))),
        SampleEncoder(QWEN_INPUTS, encoder.image_spec, encoder.tokenizer, 512, too_long="cut_turns"),
        SampleEncoder(
            QWEN_INPUTS, encoder.image_spec, Tokenizer(qwen_dir, QWEN_INPUTS.image_token_id, template="chatml"), 512
        ),
    ]
    prints = [one.fingerprint for one in (encoder, *others)]
    assert all(first != second for first, second in itertools.combinations(prints, 2))
    assert open_encoder(qwen_dir, TokenSchedule()).fingerprint == encoder.fingerprint

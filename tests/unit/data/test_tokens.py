import json
import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from megavlm.data.sample import Turn
from megavlm.data.token_weights import loss_weights
from megavlm.data.tokens import Tokenizer
from megavlm.errors import UseError
from tests.tiny import QWEN_TEMPLATE
from tests.unit.data.conftest import LLAVA_INPUTS, QWEN_INPUTS

TURNS = [
    Turn("system", "Be brief."),
    Turn("user", "<image>what is in <image> this?"),
    Turn("assistant", "a red square"),
    Turn("user", "and what else?"),
    Turn("assistant", "blue circle, 12 \u00fc\u4e2d"),
]


@pytest.fixture(scope="module")
def qwen(qwen_dir):
    return Tokenizer(qwen_dir, QWEN_INPUTS.image_token_id)


@pytest.fixture(scope="module")
def llava(llava_dir):
    return Tokenizer(llava_dir, LLAVA_INPUTS.image_token_id)


def encode(tokenizer, turns):
    """Tokens of a conversation and the weights that they have by default."""
    chat = tokenizer.encode_chat(turns)
    return chat.tokens_S, loss_weights(chat.classes_S, chat.scales_S)


def learned(tokenizer, tokens, weights):
    """The stretches of tokens with one weight other than 0, as text."""
    stretches, previous = [], 0.0
    for token, weight in zip(tokens, weights, strict=True):
        if weight and weight != previous:
            stretches.append((float(weight), []))
        if weight:
            stretches[-1][1].append(int(token))
        previous = weight
    return [(weight, tokenizer.decode(ids, skip_special_tokens=False)) for weight, ids in stretches]


def test_answers_and_their_end_markers_are_learned(qwen):
    tokens, weights = encode(qwen, TURNS)
    assert tokens.dtype == np.int64 and weights.dtype == np.float32
    assert learned(qwen, tokens, weights) == [
        (1.0, "a red square<|im_end|>"),
        (1.0, "blue circle, 12 \u00fc\u4e2d<|im_end|>"),
    ]
    # The line break behind the last marker is there, as the template prints it, but is not learned.
    assert qwen.decode([tokens[-1]]) == "\n" and weights[-1] == 0
    assert weights[-2] == 1


def test_tokens_are_those_of_transformers(qwen, qwen_dir):
    hf = AutoTokenizer.from_pretrained(qwen_dir)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a red square"}]},
    ]
    turns = [Turn("system", "Be brief."), Turn("user", "<image>what?"), Turn("assistant", "a red square")]
    tokens, _ = encode(qwen, turns)
    assert tokens.tolist() == hf.apply_chat_template(messages)["input_ids"]
    prompt = qwen.encode_prompt(turns[:-1])
    assert prompt.tolist() == hf.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert tokens[: len(prompt)].tolist() == prompt.tolist()


def test_llava_tokens_are_those_of_the_processor(llava, llava_dir):
    hf = AutoTokenizer.from_pretrained(llava_dir)
    processor = LlavaProcessor(CLIPImageProcessorPil.from_pretrained(llava_dir), hf, patch_size=7)
    text = hf.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    # The start token, which this template leaves to the tokenizer, is there once.
    prompt = llava.encode_prompt([Turn("user", "<image>\nwhat?")])
    assert prompt.tolist() == processor(text=text)["input_ids"][0]
    assert prompt[0] == hf.bos_token_id and prompt[1] != hf.bos_token_id


def test_vicuna_style_template_learns_what_it_prints(llava):
    tokens, weights = encode(llava, TURNS[1:])
    assert learned(llava, tokens, weights) == [(1.0, " a red square"), (1.0, " blue circle, 12 \u00fc\u4e2d")]
    assert weights[0] == 0  # the start token


def test_line_break_behind_an_image_is_printed_once(llava, qwen):
    with_break, without = Turn("user", "<image>\nwhat?"), Turn("user", "<image>what?")
    assert llava.encode_prompt([with_break]).tolist() == llava.encode_prompt([without]).tolist()
    # Where the template prints none, the row's own is kept.
    assert len(qwen.encode_prompt([with_break])) == len(qwen.encode_prompt([without])) + 1


def test_loss_marks_of_a_turn_are_honoured(qwen):
    first, second = Turn("assistant", "a red square", loss=False), Turn("assistant", "blue", loss_scale=2.5)
    tokens, weights = encode(qwen, [*TURNS[:2], first, TURNS[3], second])
    assert learned(qwen, tokens, weights) == [(2.5, "blue<|im_end|>")]
    plain_tokens, _ = encode(qwen, [*TURNS[:2], Turn("assistant", "a red square"), TURNS[3], Turn("assistant", "blue")])
    assert tokens.tolist() == plain_tokens.tolist()


def test_an_answer_that_repeats_the_question_is_found_where_it_stands(qwen):
    tokens, weights = encode(qwen, [Turn("user", "red"), Turn("assistant", "red")])
    assert learned(qwen, tokens, weights) == [(1.0, "red<|im_end|>")]
    assert np.flatnonzero(weights).min() > len(tokens) // 2


def test_white_space_inside_an_answer_is_learned(qwen):
    tokens, weights = encode(qwen, [Turn("user", "hi"), Turn("assistant", "a\n\n  b")])
    assert learned(qwen, tokens, weights) == [(1.0, "a\n\n  b<|im_end|>")]


def test_images_are_one_token_each_and_in_order(qwen):
    tokens, weights = encode(qwen, TURNS)
    assert (tokens == QWEN_INPUTS.image_token_id).sum() == 2
    assert not weights[tokens == QWEN_INPUTS.image_token_id].any()
    text = qwen.decode(tokens, skip_special_tokens=False)
    vision = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"user\n{vision}what is in {vision} this?<|im_end|>" in text


def test_end_of_sequence_ids_come_from_both_files(qwen, llava, tmp_path, qwen_dir):
    assert qwen.eos_token_ids == (2, 0)
    assert llava.eos_token_ids == (2,)
    assert (qwen.pad_token_id, llava.pad_token_id) == (0, 4)
    folder = copy(qwen_dir, tmp_path)
    (folder / "generation_config.json").unlink()
    assert Tokenizer(folder, 5).eos_token_ids == (2,)


def copy(hf_dir, tmp_path, template=None):
    folder = tmp_path / "copy"
    shutil.copytree(hf_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def test_template_that_rewrites_earlier_turns_is_refused(tmp_path, qwen_dir):
    # Marks the last turn, as templates do that drop the reasoning of earlier ones.
    template = QWEN_TEMPLATE.replace("message.role + '\\n'", "message.role + ('!' if loop.last else '') + '\\n'")
    tokenizer = Tokenizer(copy(qwen_dir, tmp_path, template), 5)
    with pytest.raises(UseError, match="expected a prefix-stable template"):
        tokenizer.encode_chat(TURNS)


def test_template_that_shortens_earlier_answers_is_refused(tmp_path, qwen_dir):
    inner_loop = "for content in message.content"
    template = QWEN_TEMPLATE.replace(inner_loop, "set last = loop.last %}{%- " + inner_loop).replace(
        "{{- content.text }}", "{{- content.text if last or message.role == 'user' else content.text[:2] }}"
    )
    tokenizer = Tokenizer(copy(qwen_dir, tmp_path, template), 5)
    with pytest.raises(UseError, match="expected a prefix-stable template"):
        tokenizer.encode_chat(TURNS[1:])
    tokenizer.encode_chat(TURNS[1:3])  # a single answer is the last


def test_template_whose_prompt_is_no_prefix_is_refused(tmp_path, qwen_dir):
    tokenizer = Tokenizer(copy(qwen_dir, tmp_path, QWEN_TEMPLATE.replace("assistant\\n'", "assistant\\nthink'")), 5)
    with pytest.raises(UseError, match="expected a prefix-stable template"):
        tokenizer.encode_chat(TURNS)


def test_template_that_changes_answers_is_refused(tmp_path, qwen_dir):
    template = QWEN_TEMPLATE.replace("{{- content.text }}", "{{- content.text | replace('red', '') }}")
    tokenizer = Tokenizer(copy(qwen_dir, tmp_path, template), 5)
    with pytest.raises(UseError, match="expected a template that prints answers as they are"):
        tokenizer.encode_chat(TURNS)


def test_template_that_refuses_a_role_is_named(tmp_path, qwen_dir):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + QWEN_TEMPLATE
    tokenizer = Tokenizer(copy(qwen_dir, tmp_path, template), 5)
    with pytest.raises(UseError, match="no system here.*on turns by system, user"):
        tokenizer.encode_chat(TURNS)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",  # takes text only: prints the list of parts
        QWEN_TEMPLATE.replace("<|image_pad|>", ""),
        QWEN_TEMPLATE.replace("<|image_pad|>", "<|image_pad|><|image_pad|>"),
    ],
)
def test_template_that_does_not_print_images_is_refused(tmp_path, qwen_dir, template):
    with pytest.raises(UseError, match=r"chat template: got .* for one image and the text"):
        Tokenizer(copy(qwen_dir, tmp_path, template), 5)


def test_missing_template_is_refused(tmp_path, qwen_dir):
    folder = copy(qwen_dir, tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UseError, match=r"no chat template; expected chat_template\.jinja"):
        Tokenizer(folder, 5)


@pytest.mark.parametrize("image_token_id", [300, 5000, -1])
def test_image_token_unlike_the_template_is_refused(qwen_dir, image_token_id):
    with pytest.raises(UseError, match="tokenizer: got|chat template: got"):
        Tokenizer(qwen_dir, image_token_id)


def test_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UseError, match=r"model\.hf_dir: got .*none; expected a Hugging Face directory"):
        Tokenizer(tmp_path / "none", 5)
    with pytest.raises(UseError, match="no readable tokenizer"):
        Tokenizer(tmp_path, 5)


def test_code_in_the_directory_is_never_run(tmp_path, qwen_dir):
    folder = copy(qwen_dir, tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    try:
        Tokenizer(folder, 5)
    except UseError:
        pass
    assert not (tmp_path / "ran").exists()

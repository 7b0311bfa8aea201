"""Learned tokens of public templates' formats and of the built-in ones, against transformers' own."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from megavlm.config.tokens import BUILT_IN_TEMPLATES
from megavlm.data.extend_tokens import extend_tokens
from megavlm.data.sample import Turn
from megavlm.data.token_weights import INSTRUCTION, READ, RESPONSE, SPECIAL
from megavlm.data.tokens import Tokenizer
from megavlm.errors import UseError
from tests import chat_templates
from tests.tiny import LLAVA_SPECIALS, QWEN_SPECIALS, make_tokenizer

LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"]
TURNS = [
    Turn("system", "Be brief."),
    Turn("user", "<image>\nuser"),  # what a template prints, too
    Turn("assistant", "a red square\n\n  12 \u00fc\u4e2d"),
    Turn("user", "and <image> and <image>?"),
    Turn("assistant", "no"),
]
TOOLS = json.dumps([{"name": "zoom", "description": "look closer", "parameters": {"type": "object"}}])
TOOL_TURNS = [
    Turn("user", "<image>what is small?"),
    Turn("assistant", "I look."),
    Turn("tool_call", '{"name": "zoom", "arguments": {"x": 1}}'),
    Turn("tool_call", '{"name": "zoom", "arguments": "{\\"x\\": 2}"}'),
    Turn("tool_response", '{"seen": "a fox"}'),
    Turn("tool", "nothing"),
    Turn("assistant", "a fox"),
    Turn("user", "and now?"),
    Turn("tool_call", '{"name": "zoom", "arguments": {}}'),
    Turn("tool_response", "a dog"),
    Turn("assistant", "a dog"),
]


def directory(folder, specials, template, **roles):
    tokenizer = make_tokenizer(specials, **roles)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Directories with tokenizers and templates; those that take texts only as `megavlm compose` writes them."""
    root = tmp_path_factory.mktemp("templates")
    qwen = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    llava = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    llama3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    made = {
        "qwen2_vl": directory(root / "qwen2_vl", QWEN_SPECIALS, chat_templates.QWEN2_VL, **qwen),
        "vicuna": directory(root / "vicuna", LLAVA_SPECIALS, chat_templates.VICUNA, **llava),
    }
    for name, specials, template, roles, image in (
        ("qwen3", QWEN_SPECIALS, chat_templates.QWEN3, qwen, "<|image_pad|>"),
        ("llama3", LLAMA3_SPECIALS, chat_templates.LLAMA3, llama3, "<image>"),
    ):
        directory(root / f"{name}_text", specials, template, **roles)
        made[name] = root / name
        made[name].mkdir()
        extend_tokens(root / f"{name}_text", made[name], image)
    return made


def open_tokenizer(folder, template="", reads_prompts=False):
    hf = AutoTokenizer.from_pretrained(folder)
    image = "<|image_pad|>" if "<|image_pad|>" in hf.get_vocab() else "<image>"
    return Tokenizer(folder, hf.convert_tokens_to_ids(image), template=template, reads_prompts=reads_prompts), hf


def messages_of(turns, breaks_line=False):
    """What a person would write for transformers; nothing of ours."""
    messages = []
    for turn in turns:
        parts = []
        for number, text in enumerate(turn.text.split("<image>")):
            text = text.removeprefix("\n") if number and breaks_line else text
            parts += [{"type": "image"}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
        messages.append({"role": turn.role, "content": parts})
    return messages


def learned(chat, tokenizer):
    """Stretches of answers as text."""
    is_answer = chat.classes_S >= RESPONSE
    edges = np.flatnonzero(np.diff(is_answer.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(chat.tokens_S[start:end], skip_special_tokens=False) for start, end in edges]


@pytest.mark.parametrize("name", ["qwen2_vl", "llama3"])
def test_learned_tokens_are_those_behind_the_prompts(folders, name):
    """For each answer: the tokens of the conversation up to it, less those of its prompt."""
    tokenizer, hf = open_tokenizer(folders[name])
    chat = tokenizer.encode_chat(TURNS)
    messages = messages_of(TURNS)
    whole = hf.apply_chat_template(messages, tokenize=False)
    expected = hf(whole, add_special_tokens=False)["input_ids"]
    assert chat.tokens_S.tolist() == expected
    places = []
    for index in (2, 4):
        prompt = hf.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        upto = hf.apply_chat_template(messages[: index + 1], tokenize=False)
        start, end = (len(hf(text, add_special_tokens=False)["input_ids"]) for text in (prompt, upto.rstrip()))
        places += list(range(start, end))
    assert np.flatnonzero(chat.classes_S >= RESPONSE).tolist() == places
    assert (chat.classes_S[chat.classes_S < RESPONSE] == READ).all()


@pytest.mark.parametrize(
    ("name", "template"), [("vicuna", ""), ("vicuna", "vicuna"), ("vicuna", "llama2"), ("qwen2_vl", "chatml")]
)
def test_learned_tokens_are_those_of_generation_blocks(folders, name, template):
    tokenizer, hf = open_tokenizer(folders[name], template)
    chat = tokenizer.encode_chat(TURNS)
    text = tokenizer.chosen_template or hf.chat_template
    breaks_line = name == "vicuna"
    found = hf.apply_chat_template(
        messages_of(TURNS, breaks_line), chat_template=text, return_assistant_tokens_mask=True, return_dict=True
    )
    # transformers adds no start token to a rendered text; we do, where the template leaves it to the tokenizer.
    start = len(chat.tokens_S) - len(found["input_ids"])
    assert start == (template != "llama2" and name == "vicuna")
    assert chat.tokens_S[start:].tolist() == found["input_ids"]
    assert (chat.classes_S[start:] >= RESPONSE).astype(int).tolist() == found["assistant_masks"]
    assert sum(found["assistant_masks"]) > 10


def test_an_answer_that_is_printed_otherwise_while_it_is_the_last(folders):
    """Qwen3 writes an empty passage of reasoning into the last answer alone."""
    tokenizer, hf = open_tokenizer(folders["qwen3"])
    chat = tokenizer.encode_chat(TURNS)
    first, last = learned(chat, tokenizer)
    assert first == "a red square\n\n  12 \u00fc\u4e2d<|im_end|>"
    assert last == "<think>\n\n</think>\n\nno<|im_end|>"
    reasons = [*TURNS[:4], Turn("assistant", "<think>\nwell\n</think>\n\nno")]
    assert learned(tokenizer.encode_chat(reasons), tokenizer)[1] == "<think>\nwell\n</think>\n\nno<|im_end|>"
    # Reasoning of an earlier answer is what this template leaves out: it would be trained on something else.
    with pytest.raises(UseError, match="prefix-stable"):
        tokenizer.encode_chat([*TURNS[:2], Turn("assistant", "<think>\nwell\n</think>\n\nyes"), *TURNS[3:]])


@pytest.mark.parametrize(("name", "template"), [("qwen3", ""), ("qwen2_vl", "chatml")])
def test_calls_of_tools_are_learned_and_what_tools_say_is_not(folders, name, template):
    tokenizer, hf = open_tokenizer(folders[name], template)
    chat = tokenizer.encode_chat(TOOL_TURNS, TOOLS)
    calls = [
        'I look.\n<tool_call>\n{"name": "zoom", "arguments": {"x": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "zoom", "arguments": {"x": 2}}\n</tool_call><|im_end|>',
        "a fox<|im_end|>",
        '<tool_call>\n{"name": "zoom", "arguments": {}}\n</tool_call><|im_end|>',
        ("<think>\n\n</think>\n\n" if name == "qwen3" else "") + "a dog<|im_end|>",
    ]
    assert learned(chat, tokenizer) == calls
    function = {"type": "function", "function": json.loads(TOOLS)[0]}
    texts = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is small?"}]},
        {"role": "assistant", "content": "I look.",
         "tool_calls": [{"function": {"name": "zoom", "arguments": {"x": x}}} for x in (1, 2)]},
        {"role": "tool", "content": '{"seen": "a fox"}'},
        {"role": "tool", "content": "nothing"},
        {"role": "assistant", "content": "a fox"},
        {"role": "user", "content": "and now?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "zoom", "arguments": {}}}]},
        {"role": "tool", "content": "a dog"},
        {"role": "assistant", "content": "a dog"},
    ]  # fmt: skip
    text = tokenizer.chosen_template or hf.chat_template
    expected = hf.apply_chat_template(texts, tools=[function], chat_template=text, tokenize=False)
    assert tokenizer.decode(chat.tokens_S, skip_special_tokens=False) == expected
    prompt = tokenizer.encode_prompt(TOOL_TURNS[:2], TOOLS)
    assert "zoom" in tokenizer.decode(prompt)


def test_tools_that_a_template_does_not_show_are_an_error(folders):
    tokenizer, _ = open_tokenizer(folders["qwen2_vl"])
    with pytest.raises(UseError, match="nothing printed for the tool zoom"):
        tokenizer.encode_chat(TURNS, TOOLS)
    with pytest.raises(UseError, match="the vicuna template has no tools"):
        open_tokenizer(folders["vicuna"], "vicuna")[0].encode_chat(TURNS, TOOLS)
    for text in ("zoom", '{"arguments": {}}', '{"name": "zoom", "arguments": [1]}'):
        with pytest.raises(UseError, match="a tool_call turn: got"):
            open_tokenizer(folders["qwen3"])[0].encode_chat([TURNS[1], Turn("tool_call", text)])
    with pytest.raises(UseError, match="`tools`: got"):
        tokenizer.encode_chat(TURNS, '[{"description": "no name"}]')


@pytest.mark.parametrize("name", BUILT_IN_TEMPLATES)
def test_built_in_templates_end_answers_with_a_token(folders, name):
    folder = folders["qwen2_vl" if name == "chatml" else "vicuna"]
    tokenizer, hf = open_tokenizer(folder, name)
    text = tokenizer.decode(tokenizer.encode_chat(TURNS).tokens_S, skip_special_tokens=False)
    expected = {
        "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
        "<|vision_end|>\nuser<|im_end|>\n<|im_start|>assistant\na red square\n\n  12 \u00fc\u4e2d<|im_end|>\n"
        "<|im_start|>user\nand <|vision_start|><|image_pad|><|vision_end|> and <|vision_start|><|image_pad|>"
        "<|vision_end|>?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n",
        "vicuna": "<s>Be brief. USER: <image>\nuser ASSISTANT: a red square\n\n  12 \u00fc\u4e2d</s>"
        "USER: and <image>\n and <image>\n? ASSISTANT: no</s>",
        "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nuser [/INST] a red square\n\n  12 \u00fc\u4e2d "
        "</s><s>[INST] and <image>\n and <image>\n? [/INST] no </s>",
        "llava_plain": "<s><image>\na red square\n\n  12 \u00fc\u4e2d</s><image>\n<image>\nno</s>",
        "document": "<s>Be brief.<image>\nusera red square\n\n  12 \u00fc\u4e2d</s>and <image>\n and <image>\n?no</s>",
    }
    assert text == expected[name]
    end = "<|im_end|>" if name == "chatml" else "</s>"
    assert tokenizer.end_of_turn_ids() == (hf.convert_tokens_to_ids(end),)
    assert tokenizer.eos_token_ids[0] == hf.convert_tokens_to_ids(end)
    # The Jinja text alone is the same template: that is what a checkpoint keeps.
    again, _ = open_tokenizer(folder, tokenizer.chosen_template)
    assert again.encode_chat(TURNS).tokens_S.tolist() == tokenizer.encode_chat(TURNS).tokens_S.tolist()
    assert again.fingerprint == tokenizer.fingerprint != open_tokenizer(folder)[0].fingerprint


def test_a_template_of_a_file(folders, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(chat_templates.QWEN2_VL.replace("a helpful", "a small"))
    tokenizer, _ = open_tokenizer(folders["qwen2_vl"], str(path))
    assert "a small assistant" in tokenizer.decode(tokenizer.encode_chat(TURNS[1:]).tokens_S)
    assert tokenizer.chosen_template == path.read_text()
    with pytest.raises(UseError, match=r"data\.template: got .*none\.jinja"):
        open_tokenizer(folders["qwen2_vl"], str(tmp_path / "none.jinja"))


def test_a_template_whose_markers_the_tokenizer_does_not_have(folders):
    with pytest.raises(UseError, match="chatml, whose end-of-turn marker is no special token"):
        open_tokenizer(folders["vicuna"], "chatml")


def test_a_template_that_ends_answers_with_nothing_is_told(llava_dir):
    tokenizer, _ = open_tokenizer(llava_dir)
    assert tokenizer.end_of_turn_ids() == ()


@pytest.mark.parametrize("name", ["qwen2_vl", "llama3", "vicuna", "qwen3"])
def test_questions_are_told_from_what_the_template_prints(folders, name):
    tokenizer, _ = open_tokenizer(folders[name], reads_prompts=True)
    silent = [
        TURNS[0],
        Turn("user", "<image>\nuser", loss_scale=0.5),
        TURNS[2],
        Turn("user", "and <image>?", loss=False),
    ]
    chat = tokenizer.encode_chat([*silent, TURNS[4]])
    plain, _ = open_tokenizer(folders[name])
    assert chat.tokens_S.tolist() == plain.encode_chat([*silent, TURNS[4]]).tokens_S.tolist()
    answers = plain.encode_chat([*silent, TURNS[4]]).classes_S
    assert ((chat.classes_S >= RESPONSE) == (answers >= RESPONSE)).all()
    ids = chat.tokens_S[chat.classes_S == INSTRUCTION]
    is_image = ids == tokenizer.image_token_id
    found = tokenizer.decode(ids[~is_image], skip_special_tokens=False).replace(" ", "").replace("\n", "")
    assert found == "Bebrief.userand?"
    scales = set(chat.scales_S[chat.classes_S == INSTRUCTION].tolist())
    assert scales == {1.0, 0.5, 0.0}
    special = tokenizer.decode(chat.tokens_S[chat.classes_S == SPECIAL], skip_special_tokens=False)
    assert ("assistant" in special or "ASSISTANT:" in special) and "brief" not in special


def test_a_template_that_changes_questions_is_told_only_where_it_matters(folders, tmp_path):
    path = tmp_path / "loud.jinja"
    path.write_text(
        chat_templates.QWEN2_VL.replace(
            "{{ content['text'] }}",
            "{{ content['text'] if message['role'] == 'assistant' else content['text'] | upper }}",
        )
    )
    open_tokenizer(folders["qwen2_vl"], str(path))[0].encode_chat(TURNS)
    with pytest.raises(UseError, match="texts of questions that are not printed as they are"):
        open_tokenizer(folders["qwen2_vl"], str(path), reads_prompts=True)[0].encode_chat(TURNS)

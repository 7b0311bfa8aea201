"""Give a text-only model's tokenizer and chat template an image placeholder, or any tokenizer further tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megavlm.data.tokens import load_tokenizer
from megavlm.errors import use_error

# Put in front of a template that takes texts only: content parts become one text, an image its placeholder.
_FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is string or message.content is not iterable -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set parts = namespace(text='') -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{%- set parts.text = parts.text + 'IMAGE_TOKEN' -%}
{%- else -%}{%- set parts.text = parts.text + part.text -%}{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=parts.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


@dataclass(frozen=True)
class ExtendedTokens:
    """What a tokenizer has become.

    Attributes:
        image_token_id: id of the placeholder.
        num_tokens: ids in use.
        num_tokens_before: ids in use before.
    """

    image_token_id: int
    num_tokens: int
    num_tokens_before: int


def extend_tokens(language_dir: Path, out_dir: Path, image_token: str) -> ExtendedTokens:
    """Write a language model's tokenizer and chat template with an image placeholder.

    Args:
        language_dir: Hugging Face directory with a fast tokenizer and a chat template.
        out_dir: an existing directory.
        image_token: the placeholder; added as a special token unless it is one token already.

    Raises:
        UseError: no tokenizer or chat template, or a placeholder that no tokenizer can hold as one token.
    """
    tokenizer = load_tokenizer(language_dir)
    before = len(tokenizer)
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise use_error(
            str(language_dir),
            "no chat template" if template is None else "several chat templates",
            "one, in chat_template.jinja or tokenizer_config.json",
            "use an instruction-tuned model, or write chat_template.jinja beside its tokenizer",
        )
    if not image_token.strip() or image_token != image_token.strip() or "'" in image_token or "\\" in image_token:
        raise use_error(
            "--image-token", repr(image_token), "a word without quotes and blanks around it", "use `<image>`"
        )
    tokenizer.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = None  # it goes into a file of its own, where processors look for it
    tokenizer.save_pretrained(out_dir)
    text = _FLATTEN.replace("IMAGE_TOKEN", image_token) + template
    (out_dir / "chat_template.jinja").write_text(text, encoding="utf-8")
    image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    assert isinstance(image_token_id, int), "a token has one id"
    return ExtendedTokens(image_token_id, len(tokenizer), before)


def add_tokens(source_dir: Path, out_dir: Path, tokens: Sequence[str]) -> tuple[int, int]:
    """Write a tokenizer with further tokens, which stay in a text when special tokens are left out of it.

    Args:
        source_dir: Hugging Face directory with a fast tokenizer.
        out_dir: an existing directory.
        tokens: those that are there already stay what they are.

    Returns:
        Ids in use before, and now.

    Raises:
        UseError: no tokenizer, or it has all of them.
    """
    tokenizer = load_tokenizer(source_dir)
    before = len(tokenizer)
    tokenizer.add_tokens(list(dict.fromkeys(tokens)))
    if len(tokenizer) == before:
        raise use_error(str(source_dir), "a tokenizer that has these tokens", "new ones", "use the directory as it is")
    ids = tokenizer.convert_tokens_to_ids(list(tokenizer.get_added_vocab()))
    assert max(ids) < len(tokenizer), "new tokens have the ids behind the old ones"
    tokenizer.save_pretrained(out_dir)
    return before, len(tokenizer)

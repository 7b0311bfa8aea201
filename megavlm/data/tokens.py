"""Turns to token ids through the model directory's own chat template, with the weight of every token.

What is learned comes out of the template itself: for each answer, the text that the template prints for the
conversation up to it, less what it prints as the prompt for it. The whole conversation is then tokenised once, and the
tokens that lie in those spans get weights. The only place of the data room that knows transformers.

Shape suffix: S tokens of one sample.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from megavlm.data.readers import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from megavlm.data.sample import Turn
from megavlm.errors import use_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PROBE = "probe"
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class Tokenizer:
    """A Hugging Face directory's tokenizer and chat template; local files only, no code from the directory is run.

    Attributes:
        image_token_id: id of the image placeholder.
        image_token: the placeholder as the template prints it.
        pad_token_id: what fills a packed row up; never learned.
        image_borders: ids of the tokens around an image, where the family has them.
        eos_token_ids: what ends an answer, from generation_config.json and the tokenizer.
    """

    def __init__(self, hf_dir: str | Path, image_token_id: int, has_borders: bool = False) -> None:
        """Load and check the directory's tokenizer.

        Args:
            hf_dir: Hugging Face directory.
            image_token_id: `InputSpec.image_token_id`, which the template must print once for an image.
            has_borders: `InputSpec.has_borders`.

        Raises:
            UseError: no fast tokenizer, no chat template, or one that does not print the image's placeholder.
        """
        self._where = str(Path(hf_dir).absolute())
        self._loaded: PreTrainedTokenizerFast | None = None
        self.image_token_id = image_token_id
        self.image_token = self._image_token()
        self.image_borders = self._image_borders() if has_borders else ()
        self.eos_token_ids = _eos_token_ids(Path(hf_dir), self._tokenizer)
        pad = self._tokenizer.pad_token_id
        self.pad_token_id: int = pad if pad is not None else (*self.eos_token_ids, 0)[0]
        self._template_breaks_line = self._probe_template()

    @property
    def _tokenizer(self) -> "PreTrainedTokenizerFast":
        if self._loaded is None:
            self._loaded = load_tokenizer(Path(self._where))
        return self._loaded

    @property
    def fingerprint(self) -> str:
        """Of the directory's files that decide about tokens, as hexadecimal digits."""
        state = hashlib.sha256()
        for name in _FILES:
            path = Path(self._where) / name
            if path.is_file():
                state.update(name.encode() + path.read_bytes())
        return state.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """To a data worker goes only the directory's name: most workers never need the tokenizer itself."""
        return {**self.__dict__, "_loaded": None}

    def encode_chat(self, turns: Sequence[Turn]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise a conversation, image placeholders not yet expanded (one token an image).

        Returns:
            Token ids (int64 [S]) and the weight of predicting each of them (float32 [S]): the turn's `loss_scale` on
            an answer and its end-of-turn marker, 0 elsewhere, on white space behind the marker, and on turns whose
            `loss` is False.

        Raises:
            UseError: the template is not prefix-stable, does not print an answer, or refuses the conversation.
        """
        text = self._render(turns, add_generation_prompt=False)
        spans = [
            (*self._span(turns, index, text), turn.loss_scale)
            for index, turn in enumerate(turns)
            if turn.role == "assistant" and turn.loss is not False
        ]
        encoding = self._tokenizer(
            text, add_special_tokens=self._adds_special_tokens(text), return_offsets_mapping=True
        )
        tokens_S = np.array(encoding["input_ids"], dtype=np.int64)
        offsets = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        first, last = offsets[:, 0], offsets[:, 1]
        weights_S = np.zeros(len(tokens_S), dtype=np.float32)
        for start, end, scale in spans:
            # Tokens without an extent are special tokens that the tokenizer added, or trimmed white space.
            inside = (first >= start) & (last <= end) & ((last > first) | (first > start))
            if not inside.any():
                raise use_error(
                    "an answer", repr(text[start:end][:40]), "at least one token of its own", "lengthen the answer"
                )
            weights_S[inside] = scale
        return tokens_S, weights_S

    def encode_prompt(self, turns: Sequence[Turn]) -> np.ndarray:
        """Tokenise a conversation that ends with a question, and the template's prompt for the answer: int64 [S]."""
        text = self._render(turns, add_generation_prompt=True)
        encoding = self._tokenizer(text, add_special_tokens=self._adds_special_tokens(text))
        return np.array(encoding["input_ids"], dtype=np.int64)

    def encode_text(self, text: str) -> np.ndarray:
        """Token ids of a plain text, nothing added: int64 [S]."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)

    def token(self, token_id: int) -> str:
        """The text of a token."""
        return str(self._tokenizer.convert_ids_to_tokens(token_id))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Token ids as text."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def _adds_special_tokens(self, text: str) -> bool:
        # As transformers' processors do: a template that prints the first token itself must not get it twice.
        bos = self._tokenizer.bos_token
        return bos is None or not text.startswith(bos)

    def _span(self, turns: Sequence[Turn], index: int, text: str) -> tuple[int, int]:
        """Where in `text` answer `index` and its end-of-turn marker stand."""
        prompt = self._render(turns[:index], add_generation_prompt=True)
        upto = self._render(turns[: index + 1], add_generation_prompt=False)
        if not upto.startswith(prompt) or not text.startswith(upto):
            raise use_error(
                f"{self._where} chat template",
                f"a different text for the turns before answer {index} than for the whole conversation",
                "a prefix-stable template: each turn only adds text",
                "use a template that does not rewrite or drop earlier turns",
            )
        if turns[index].text.strip() not in upto[len(prompt) :]:
            raise use_error(
                f"{self._where} chat template",
                f"{upto[len(prompt) :][:60]!r} printed for the answer {turns[index].text[:60]!r}",
                "a template that prints answers as they are",
                "use a template that takes content parts and leaves answers alone",
            )
        return len(prompt), len(upto.rstrip())

    def _render(self, turns: Sequence[Turn], *, add_generation_prompt: bool) -> str:
        messages = [{"role": turn.role, "content": self._parts(turn.text)} for turn in turns]
        return self._render_messages(messages, add_generation_prompt)

    def _parts(self, text: str) -> list[dict[str, str]]:
        parts: list[dict[str, str]] = []
        for piece in re.split(f"({IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER})", text):
            if piece in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER):
                parts.append({"type": piece.strip("<>")})
                continue
            if self._template_breaks_line and parts and parts[-1]["type"] != "text":
                # LLaVA rows say `<image>\n`; where the template breaks the line too, one of them is enough.
                piece = piece.removeprefix("\n")
            if piece:
                parts.append({"type": "text", "text": piece})
        return parts or [{"type": "text", "text": ""}]

    def _render_messages(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError) as error:
            raise use_error(
                f"{self._where} chat template",
                f"an error ({error}) on turns by {', '.join(message['role'] for message in messages)}",
                "turns that the model's template takes",
                "change the row, or the template",
            ) from error
        assert isinstance(text, str)
        return text

    def _image_token(self) -> str:
        token = None
        if 0 <= self.image_token_id < len(self._tokenizer):
            token = self._tokenizer.convert_ids_to_tokens(self.image_token_id)
        if not isinstance(token, str) or self._tokenizer.encode(token, add_special_tokens=False) != [
            self.image_token_id
        ]:
            raise use_error(
                f"{self._where} tokenizer",
                f"{token!r} for id {self.image_token_id}",
                "the image placeholder of config.json as one token",
                "use the tokenizer that the model came with",
            )
        return token

    def _image_borders(self) -> tuple[int, int]:
        """Ids of the tokens that tokenizer_config.json calls start_image_token and end_image_token."""
        path = Path(self._where) / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))  # transformers has read it already
        named = {**(config.get("extra_special_tokens") or {}), **config}
        tokens = [named.get(key) for key in ("start_image_token", "end_image_token")]
        tokens = [token.get("content") if isinstance(token, dict) else token for token in tokens]
        ids = [self._tokenizer.encode(token, add_special_tokens=False) if token else [] for token in tokens]
        if not all(len(one) == 1 for one in ids):
            raise use_error(
                str(path),
                f"{tokens} as start_image_token and end_image_token",
                "two special tokens",
                "use the tokenizer that the model came with",
            )
        return ids[0][0], ids[1][0]

    def _probe_template(self) -> bool:
        """Check what the template prints for an image; returns whether it breaks the line behind it."""
        if self._tokenizer.chat_template is None:
            raise use_error(
                self._where,
                "no chat template",
                "chat_template.jinja",
                "copy it from the model's Hugging Face directory",
            )
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _PROBE}]}
        text = self._render_messages([message], False)
        if text.count(self.image_token) != 1 or text.count(_PROBE) != 1 or f"'{_PROBE}'" in text:
            raise use_error(
                f"{self._where} chat template",
                f"{text[:120]!r} for one image and the text {_PROBE!r}",
                f"the text, and {self.image_token} once",
                "use a template that takes content parts (a list of image and text)",
            )
        return f"\n{_PROBE}" in text.split(self.image_token, 1)[1]


def load_tokenizer(hf_dir: Path) -> "PreTrainedTokenizerFast":
    """A directory's tokenizer; local files only, no code from the directory is run.

    Raises:
        UseError: no directory, or no fast tokenizer in it.
    """
    # Here, not at the top: the import takes seconds and 200 MB, which data workers are spared.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not hf_dir.is_dir():
        raise use_error("model.hf_dir", str(hf_dir), "a Hugging Face directory", "correct the path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise use_error(
            str(hf_dir),
            f"no readable tokenizer ({reason})",
            "tokenizer.json and tokenizer_config.json",
            "copy them from the model's Hugging Face directory",
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise use_error(
            str(hf_dir),
            "a slow tokenizer",
            "a fast one (tokenizer.json), which tells where tokens stand in the text",
            "convert it with transformers and save it",
        )
    return tokenizer


def _eos_token_ids(hf_dir: Path, tokenizer: "PreTrainedTokenizerFast") -> tuple[int, ...]:
    listed: Any = None
    path = hf_dir / "generation_config.json"
    if path.is_file():
        try:
            listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise use_error(str(path), str(error), "a JSON object", "copy the file from the model again") from error
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return tuple(dict.fromkeys(int(token_id) for token_id in ids))

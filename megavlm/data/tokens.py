"""Turns to token ids through a chat template, with the kind of every token and what its weight is multiplied by.

What is learned comes out of the template itself: for each answer, the text that the template prints for the
conversation up to it, less what it prints as the prompt for it. The whole conversation is then tokenised once, and the
tokens that lie in those spans are the answer's. The only place of the data room that knows transformers.

Shape suffix: S tokens of one sample.
"""

import hashlib
import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from megavlm.config.tokens import BUILT_IN_TEMPLATES
from megavlm.data.messages import Spoken, parse_tools, spoken, text_part
from megavlm.data.sample import Turn
from megavlm.data.spans import Marks, Span, answer_end, box_spans, entity_spans
from megavlm.data.steps import StepEnds, step_classes
from megavlm.data.templates import template_text
from megavlm.data.token_weights import BOX, ENTITY, INSTRUCTION, READ, RESPONSE, SPECIAL
from megavlm.errors import UseError, use_error

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


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as tokens, image placeholders not yet expanded (one token an image).

    `classes_S` (int8) are kinds of `token_weights.py`; `scales_S` (float32) the turn's `loss_scale`, 0 where its
    `loss` is False.
    """

    tokens_S: np.ndarray
    classes_S: np.ndarray
    scales_S: np.ndarray


class Tokenizer:
    """A Hugging Face directory's tokenizer and a chat template; local files only, no code from the directory is run.

    Attributes:
        image_token_id: id of the image placeholder.
        image_token: the placeholder as the template prints it.
        pad_token_id: what fills a packed row up; never learned.
        image_borders: ids of the tokens around an image, where the family has them.
        eos_token_ids: what ends an answer, from a chosen template, generation_config.json and the tokenizer.
        chosen_template: Jinja text of a template that is not the directory's own; empty: it is.
    """

    def __init__(
        self,
        hf_dir: str | Path,
        image_token_id: int,
        has_borders: bool = False,
        template: str = "",
        reads_prompts: bool = False,
    ) -> None:
        """Load and check the directory's tokenizer.

        Args:
            hf_dir: Hugging Face directory.
            image_token_id: `InputSpec.image_token_id`, which the template must print once for an image.
            has_borders: `InputSpec.has_borders`.
            template: see `templates.template_text`; empty: the directory's own.
            reads_prompts: tell what the template prints from the texts of questions; False: all that is not an answer
                is only read.

        Raises:
            UseError: no fast tokenizer, no chat template, or one that does not print the image's placeholder.
        """
        self._where = str(Path(hf_dir).absolute())
        self._loaded: PreTrainedTokenizerFast | None = None
        self._packed = b""
        self._reads_prompts = reads_prompts
        self.image_token_id = image_token_id
        self.image_token = self._image_token()
        self.image_borders = self._image_borders() if has_borders else ()
        self.eos_token_ids = _eos_token_ids(Path(hf_dir), self._tokenizer)
        pad = self._tokenizer.pad_token_id
        self.pad_token_id: int = pad if pad is not None else (*self.eos_token_ids, 0)[0]
        self.chosen_template = ""
        if template:
            self.chosen_template = template_text(template, *(self._visual_text(kind) for kind in ("image", "video")))
        self._template_breaks_line = self._probe_template()
        if template:
            if template in BUILT_IN_TEMPLATES:
                self._check_end(template)
            self.eos_token_ids = tuple(dict.fromkeys((*self.end_of_turn_ids()[:1], *self.eos_token_ids)))

    @property
    def _tokenizer(self) -> "PreTrainedTokenizerFast":
        if self._loaded is None:
            self._loaded = pickle.loads(self._packed) if self._packed else load_tokenizer(Path(self._where))
            # As transformers sets them for a text that is neither truncated nor padded, whatever tokenizer.json says.
            backend = self._loaded.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = self._loaded.split_special_tokens
        return self._loaded

    @property
    def fingerprint(self) -> str:
        """Of the chosen template and the directory's files that decide about tokens, as hexadecimal digits."""
        state = hashlib.sha256(f"{self._reads_prompts} {self.chosen_template}".encode())
        for name in _FILES:
            path = Path(self._where) / name
            if path.is_file():
                state.update(name.encode() + path.read_bytes())
        return state.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """To a data worker the tokenizer goes as bytes, unpacked when it is first needed.

        That imports its class alone. To load it from its directory takes `AutoTokenizer`, whose import takes many times
        as long: it brings what generates text along.
        """
        self._packed = self._packed or pickle.dumps(self._tokenizer)
        return {**self.__dict__, "_loaded": None}

    def encode_chat(
        self, turns: Sequence[Turn], tools: str = "", entities: Sequence[str] = (), steps: StepEnds | None = None
    ) -> EncodedChat:
        """Tokenise a conversation.

        An answer and its end-of-turn marker are of the kinds RESPONSE, BOX and ENTITY. What is not an answer is READ;
        with `reads_prompts` the texts of other turns are INSTRUCTION, and the rest that the template prints SPECIAL.

        Args:
            turns: of a row.
            tools: `Sample.tools`.
            entities: names that are of the kind ENTITY in answers.
            steps: of the last answer, where nothing but their marks is learned.

        Raises:
            UseError: the template is not prefix-stable, does not print an answer or a tool, or refuses the
                conversation.
        """
        messages = spoken(turns, self._template_breaks_line)
        functions = parse_tools(tools)
        text = self._render(messages, functions, add_generation_prompt=False)
        self._check_tools(functions, text)
        answers = [
            (*self._span(messages, index, functions, text), message.scale)
            for index, message in enumerate(messages)
            if message.role == "assistant"
        ]
        others = self._other_spans(messages, functions, text) if self._reads_prompts else []
        # Not by calling transformers' tokenizer: what it adds to the library beneath it takes longer than that does.
        encoding = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=self._adds_special_tokens(text))
        tokens_S = np.array(encoding.ids, dtype=np.int64)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        first_S, last_S = offsets[:, 0], offsets[:, 1]
        classes_S = np.full(len(tokens_S), READ, dtype=np.int8)
        scales_S = np.ones(len(tokens_S), dtype=np.float32)
        if self._reads_prompts:
            classes_S[last_S > first_S] = SPECIAL
        for start, end, scale in others:
            inside_S = (first_S < end) & (last_S > start)
            classes_S[inside_S], scales_S[inside_S] = INSTRUCTION, scale
        for start, end, scale in answers:
            # Tokens without an extent are special tokens that the tokenizer added, or trimmed white space.
            inside_S = (first_S >= start) & (last_S <= end) & ((last_S > first_S) | (first_S > start))
            if not inside_S.any():
                raise use_error(
                    "an answer", repr(text[start:end][:40]), "at least one token of its own", "lengthen the answer"
                )
            classes_S[inside_S], scales_S[inside_S] = RESPONSE, scale
        answer_spans = [(start, end) for start, end, _ in answers]
        for kind, spans in ((ENTITY, entity_spans(text, answer_spans, entities)), (BOX, box_spans(text, answer_spans))):
            for start, end in spans:
                classes_S[(first_S < end) & (last_S > start) & (classes_S >= RESPONSE)] = kind
        if steps is not None:
            return EncodedChat(
                tokens_S, step_classes(text, answers[-1][0], steps, first_S, last_S), np.ones_like(scales_S)
            )
        return EncodedChat(tokens_S, classes_S, scales_S)

    def encode_prompt(self, turns: Sequence[Turn], tools: str = "") -> np.ndarray:
        """Tokenise a conversation that ends with a question, and the template's prompt for the answer: int64 [S]."""
        functions = parse_tools(tools)
        text = self._render(spoken(turns, self._template_breaks_line), functions, add_generation_prompt=True)
        self._check_tools(functions, text)
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

    def end_of_turn_ids(self) -> tuple[int, ...]:
        """Special tokens that the template prints behind an answer; empty: a tuned model does not learn to stop."""
        asked = Spoken("user", (text_part("question"),), (), 1.0)
        text = self._render([asked, Spoken("assistant", (text_part(_PROBE),), (), 1.0)], [])
        ids = self._tokenizer.encode(text.rpartition(_PROBE)[2], add_special_tokens=False)
        return tuple(token_id for token_id in ids if token_id in self._tokenizer.all_special_ids)

    def _span(self, messages: Sequence[Spoken], index: int, tools: list[dict[str, Any]], text: str) -> Span:
        """Where in `text` answer `index` and its end-of-turn marker stand."""
        prompt = self._render(messages[:index], tools, add_generation_prompt=True)
        upto = text if index + 1 == len(messages) else self._render(messages[: index + 1], tools)
        answer = messages[index]
        end = None
        if upto.startswith(prompt):
            if not all(piece in upto[len(prompt) :] for piece in answer.printed):
                raise use_error(
                    self._name,
                    f"{upto[len(prompt) :][:60]!r} printed for the answer {' '.join(answer.printed)[:60]!r}",
                    "a template that prints answers as they are",
                    "use a template that takes content parts and leaves answers alone",
                )
            end = answer_end(text, prompt, upto, answer.printed)
        if end is None:
            raise use_error(
                self._name,
                f"a different text for the turns before answer {index} than for the whole conversation",
                "a prefix-stable template: each turn only adds text",
                "use a template that does not rewrite or drop earlier turns",
            )
        return len(prompt), end

    def _other_spans(
        self, messages: Sequence[Spoken], tools: list[dict[str, Any]], text: str
    ) -> list[tuple[int, int, float]]:
        """Where the texts of turns that are no answers stand, and their scales."""
        marks = Marks()
        scales: list[float] = []
        marked = []
        for message in messages:
            if message.role == "assistant":
                marked.append(message.message())
                continue
            marked.append(message.message(marks.show))
            scales += [message.scale] * (len(marks.texts) - len(scales))
        found = marks.find(self._render_messages(marked, tools, False), text)
        if found is None:
            raise use_error(
                self._name,
                "texts of questions that are not printed as they are",
                "a template that leaves them alone, since data.token_weights tells them from what it prints itself",
                "use another template, or set special and instruction to 0",
            )
        return [(*span, scales[number]) for number, span in found]

    def _render(
        self, messages: Sequence[Spoken], tools: list[dict[str, Any]], *, add_generation_prompt: bool = False
    ) -> str:
        return self._render_messages([message.message() for message in messages], tools, add_generation_prompt)

    def _render_messages(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], add_generation_prompt: bool
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                chat_template=self.chosen_template or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError) as error:
            raise use_error(
                self._name,
                f"an error ({error}) on turns by {', '.join(message['role'] for message in messages)}",
                "turns that the model's template takes",
                "change the row, or the template",
            ) from error
        assert isinstance(text, str)
        return text

    @property
    def _name(self) -> str:
        return "data.template" if self.chosen_template else f"{self._where} chat template"

    def _check_tools(self, tools: list[dict[str, Any]], text: str) -> None:
        missing = [tool["function"]["name"] for tool in tools if tool["function"]["name"] not in text]
        if missing:
            raise use_error(
                self._name, f"nothing printed for the tool {missing[0]}", "a template that shows tools", "use another"
            )

    def _check_end(self, template: str) -> None:
        """An answer must end with a token, or a tuned model would never stop."""
        if self.end_of_turn_ids():
            return
        raise use_error(
            "data.template",
            f"{template}, whose end-of-turn marker is no special token of {self._where}",
            "a template that fits the tokenizer",
            "use another (vicuna needs an eos_token only), or add the marker to the tokenizer",
        )

    def _visual_text(self, kind: str) -> str:
        """What the directory's own template prints for an image (a video); without one, the bare placeholder."""
        if self._tokenizer.chat_template is None:
            return self._bare_visual_text(kind)
        probe = text_part(_PROBE)
        without = self._render_messages([{"role": "user", "content": [probe]}], [], False)
        try:
            text = self._render_messages([{"role": "user", "content": [{"type": kind}, probe]}], [], False)
        except UseError:
            if kind == "image":
                raise
            return ""  # a model that takes no videos
        before = len(os.path.commonprefix((without, text)))
        after = len(os.path.commonprefix((without[before:][::-1], text[before:][::-1])))
        return text[before : len(text) - after]

    def _bare_visual_text(self, kind: str) -> str:
        """The placeholder, between the markers that config.json names (Qwen-VL)."""
        path = Path(self._where) / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        video = config.get("video_token_id")
        placeholder = self.image_token_id if kind == "image" else video
        ids = (config.get("vision_start_token_id"), placeholder, config.get("vision_end_token_id"))
        return "".join(self.token(token_id) for token_id in ids if isinstance(token_id, int))

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
        if self._tokenizer.chat_template is None and not self.chosen_template:
            raise use_error(
                self._where,
                "no chat template",
                "chat_template.jinja",
                "copy it from the model's Hugging Face directory, or set data.template",
            )
        message = {"role": "user", "content": [{"type": "image"}, text_part(_PROBE)]}
        text = self._render_messages([message], [], False)
        # A chosen template may leave questions out, as that of LLaVA's first stage does.
        num_texts = (0, 1) if self.chosen_template else (1,)
        if text.count(self.image_token) != 1 or text.count(_PROBE) not in num_texts or f"'{_PROBE}'" in text:
            raise use_error(
                self._name,
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
    # Here, not at the top: the import takes seconds and 200 MB, which data workers are spared (see `__getstate__`).
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

"""Where in a rendered conversation something stands: answers, texts of other turns, coordinates, names."""

import json
import re
from collections.abc import Iterable, Sequence

_NUMBER = r"\s*-?\d+(?:\.\d+)?\s*"
_BOXES = re.compile(
    r"<box>.*?</box>|<object>.*?</object>|<\|box_start\|>.*?<\|box_end\|>"
    rf"|\[(?:{_NUMBER},){{3}}{_NUMBER}\]"
    rf'|(?<="point_2d": )\[{_NUMBER},{_NUMBER}\]',
    re.DOTALL,
)
_NAMES = re.compile(
    r"<ref>(.*?)</ref>|<phrase>(.*?)</phrase>|<\|object_ref_start\|>(.*?)<\|object_ref_end\|>", re.DOTALL
)
# Private-use characters: no text and no template has them for a reason.
_MARK = re.compile("\ue000(\\d+)\ue001")

Span = tuple[int, int]


def answer_end(text: str, prompt: str, upto: str, printed: Sequence[str]) -> int | None:
    """Where in `text` an answer and its end-of-turn marker end that starts behind `prompt`; None: it cannot be told.

    Templates only add text, or print something of their own in front of the last answer alone (an empty passage of
    reasoning): then that is left out, but nothing of what the row says.

    Args:
        text: the whole conversation.
        prompt: what the template prints as the prompt for the answer.
        upto: what it prints for the conversation up to the answer, which begins with `prompt`.
        printed: what belongs to the answer.
    """
    if not text.startswith(prompt):
        return None
    added = upto[len(prompt) :].rstrip()
    for start in range(len(added)):
        rest = added[start:]
        if not all(piece in rest for piece in printed):
            return None
        if text.startswith(rest, len(prompt)):
            return len(prompt) + len(rest)
    return None


class Marks:
    """Marks in place of texts, that show where a template prints which."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def show(self, text: str) -> str:
        """A mark for a text."""
        self.texts.append(text)
        return f"\ue000{len(self.texts) - 1}\ue001"

    def find(self, marked: str, text: str) -> list[tuple[int, Span]] | None:
        """Which text stands where in `text`: what the template printed, as it printed `marked` with marks.

        A template may trim a text or print it as JSON does. None: it did something else with one.
        """
        pieces = _MARK.split(marked)
        if not text.startswith(pieces[0]):
            return None
        position, spans = len(pieces[0]), []
        for number, literal in zip(pieces[1::2], pieces[2::2], strict=True):
            whole = self.texts[int(number)]
            forms = (whole, whole.strip(), whole.lstrip(), whole.rstrip(), json.dumps(whole, ensure_ascii=False)[1:-1])
            for form in dict.fromkeys(forms):
                if text.startswith(form + literal, position):
                    spans.append((int(number), (position, position + len(form))))
                    position += len(form) + len(literal)
                    break
            else:
                return None
        return spans if position == len(text) else None


def box_spans(text: str, within: Iterable[Span]) -> list[Span]:
    """Coordinates inside some spans."""
    return [(found.start(), found.end()) for start, end in within for found in _BOXES.finditer(text, start, end)]


def entity_spans(text: str, within: Iterable[Span], names: Iterable[str]) -> list[Span]:
    """Names inside some spans: of references, and these, as whole words."""
    wanted = sorted({name for name in names if name.strip()}, key=len, reverse=True)
    words = re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in wanted)) if wanted else None
    spans: list[Span] = []
    for start, end in within:
        spans += [found.span(found.lastindex or 0) for found in _NAMES.finditer(text, start, end)]
        if words is not None:
            spans += [found.span() for found in words.finditer(text, start, end)]
    return spans

"""Documents: {"text": "words <image> words <image> words", "images": [...]}: text and images interleaved, or text.

What stands behind the last image is the row's answer, what stands in front of it its question: with the template
`document`, which prints both as they are, and data.token_weights.instruction=1 all words are learned (interleaved
pretraining: Flamingo, Alayrac et al., arXiv 2204.14198; OBELICS, Laurencon et al., arXiv 2306.16527).
"""

from megavlm.data.formats.columns import Columns
from megavlm.data.formats.finish import finish
from megavlm.data.formats.turns import PLACEHOLDERS, read_turns, row_error
from megavlm.data.row_options import RowOptions
from megavlm.data.sample import Sample

KEY = "text"
_CONVERSATIONS = ("messages", "conversations", "conversation", "prompt", "problem", "txt")
"""Of rows of other formats, where a column `text` is one more."""


def fits(columns: Columns) -> bool:
    """Whether the row is one of these."""
    return columns.has(KEY) and not any(columns.has(key) for key in _CONVERSATIONS)


def read(columns: Columns, sample_id: str, options: RowOptions) -> Sample:
    """The row's sample.

    Raises:
        UseError: naming the row: it is no text, or no word stands behind its last image.
    """
    text = columns.take(KEY)
    if not isinstance(text, str):
        raise row_error(columns.where, f"`{KEY}` of type {type(text).__name__}", "a text")
    ends = [text.rfind(placeholder) + len(placeholder) for placeholder in PLACEHOLDERS.values() if placeholder in text]
    start = max(ends, default=0)
    if not text[start:].strip():
        got = "no word behind the last image" if ends else f"an empty `{KEY}`"
        raise row_error(columns.where, got, "text to learn", "remove what stands at the end, or the row")
    entries = [{"role": "user", "content": text[:start]}, {"role": "assistant", "content": text[start:]}]
    return finish(columns, sample_id, read_turns(entries, KEY, columns.where), require_answer=True)

"""Images of a row with the text of any row, as one question: does it belong to them?

Which text an image is shown with is decided in training, so these sequences are made then, and put behind those that
the packed row has (`HardNegatives` in train/stages/matching.py).
"""

import re
from hashlib import blake2b

from megavlm.data.dataset import Dataset
from megavlm.data.image_text import shown_of, text_of
from megavlm.data.readers import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from megavlm.data.sample import EncodedSample, InlineBytes, Sample, Turn

DIGEST_BYTES = 5
_PLACEHOLDERS = re.compile(f"{re.escape(IMAGE_PLACEHOLDER)}|{re.escape(VIDEO_PLACEHOLDER)}")


def content_digests(row: EncodedSample) -> tuple[int, int]:
    """Numbers that tell images (videos) from others, and texts: equal where two rows show, or say, the same.

    Args:
        row: of images and their text.
    """
    shown = [image.data if isinstance(image, InlineBytes) else repr(image).encode() for image in row.images]
    _, said = row.parts
    return _digest(b"".join(blake2b(one).digest() for one in shown)), _digest(row.tokens_S[said].tobytes())


def _digest(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=DIGEST_BYTES).digest(), "big")


def encode_match(dataset: Dataset, shown: int, said: int, prompt: str) -> EncodedSample:
    """The question whether the text of one row belongs to the images of another, or of the same.

    Args:
        dataset: prepared rows of images and their text.
        shown: index of the row whose images are shown, in their order there.
        said: of the row whose text is read.
        prompt: what stands behind; empty: nothing.
    """
    encoder, row = dataset.encoder, dataset.sample(shown)
    turns = shown_of(row, encoder.prompts).turns
    placeholders = "".join(_PLACEHOLDERS.findall("".join(turn.text for turn in turns)))
    lines = [placeholders, text_of(dataset.sample(said)), *([prompt] if prompt else [])]
    asked = Sample(row.sample_id, (Turn("user", "\n".join(lines)),), row.images, row.videos)
    return encoder.encode_question(asked, dataset.grids_each[shown])

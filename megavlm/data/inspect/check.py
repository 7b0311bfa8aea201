"""Every row and every image of a data set looked at: what is wrong, and which rows pass."""

import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megavlm.data.encode import SampleEncoder, TooLong
from megavlm.data.inspect.boxes import wrong_boxes
from megavlm.data.inspect.likeness import first_alike
from megavlm.data.inspect.pictures import HASH_BYTES, Picture, images_of, look_at_all
from megavlm.data.inspect.processes import map_items
from megavlm.data.inspect.rows import read_row
from megavlm.data.media import media_name
from megavlm.data.sample import Media, Sample
from megavlm.data.videos import read_video_header
from megavlm.errors import UseError

MISTAKES = {
    "broken_json": "not readable as JSON",
    "turn_order": "turns that do not take turns, or no answer at the end",
    "empty_answer": "an answer without text",
    "missing_image": "an image or video file that is not there",
    "broken_image": "an image that cannot be decoded whole",
    "broken_video": "a video that cannot be opened",
    "box_out_of_range": "a box outside its image, or one that ends before it begins",
    "repeated_row": "the same turns and images as an earlier row",
    "does_not_encode": "chat template, tokenizer or image processor refuse it",
    "other": "anything else that the reader refuses",
}
"""Why a row does not pass."""
REMARKS = {
    "duplicate_image": "another file with the same bytes comes earlier",
    "near_duplicate_image": "an image that looks like an earlier one",
    "too_long": "more tokens than max_length: training leaves it out",
    "cut": "more tokens than max_length: training leaves out its last turns, or the end of an answer",
    "nothing_to_learn": "no token has a weight: training leaves it out",
}
"""What is said of a row or image that passes all the same."""

# What the reader's messages say, by which its refusals are sorted.
_READER_WORDS = (
    ("broken JSON", "broken_json"),
    ("got no image", "missing_image"),
    ("got no video", "missing_image"),
    ("got turns by", "turn_order"),
    ("got no answer at the end", "turn_order"),
    ("got the empty answer", "empty_answer"),
)


@dataclass(frozen=True)
class Finding:
    """Something that was found: `row` counts from 0, `reason` is one of MISTAKES or REMARKS."""

    row: int
    reason: str
    message: str


@dataclass(frozen=True)
class CheckReport:
    """What `check_rows` found.

    Attributes:
        num_rows: that were looked at.
        num_images: different image files, archive members or inline images.
        findings: in the rows' order.
        passing: numbers of the rows without a mistake, ascending.
    """

    num_rows: int
    num_images: int
    findings: tuple[Finding, ...]
    passing: tuple[int, ...]

    def counts(self) -> dict[str, int]:
        """Findings by reason, in the order of MISTAKES and REMARKS."""
        counted = Counter(finding.reason for finding in self.findings)
        return {reason: counted[reason] for reason in (*MISTAKES, *REMARKS) if counted[reason]}


def check_rows(
    samples: Sequence[Sample], encoder: SampleEncoder | None = None, nproc: int = 1, max_distance: int = 16
) -> CheckReport:
    """Look at every row, and decode every image whole.

    Args:
        samples: all rows; taking one may raise its UseError.
        encoder: of a model, for what template, tokenizer and processors say; None: not asked.
        nproc: processes that decode and encode.
        max_distance: bits of 256 in which images that look alike may differ.
    """
    rows = [read_row(samples, row) for row in range(len(samples))]
    findings = [Finding(row, _sorted(read), str(read)) for row, read in enumerate(rows) if isinstance(read, UseError)]
    readable = [(row, read) for row, read in enumerate(rows) if isinstance(read, Sample)]
    pictures = look_at_all((image for _, sample in readable for image in images_of(sample)), nproc)
    findings += _repeated(readable)
    for row, sample in readable:
        findings += _looked_at(row, sample, pictures)
    findings += _alike(readable, pictures, max_distance)
    if encoder is not None:
        broken = {finding.row for finding in findings if finding.reason in ("missing_image", "broken_image")}
        whole = [(row, sample) for row, sample in readable if row not in broken]
        encode = functools.partial(_encode_problem, encoder)
        for (row, _), found in zip(whole, map_items(encode, [sample for _, sample in whole], nproc), strict=True):
            if found:
                findings.append(Finding(row, *found))
    wrong = {finding.row for finding in findings if finding.reason in MISTAKES}
    findings.sort(key=lambda finding: finding.row)
    passing = tuple(row for row in range(len(rows)) if row not in wrong)
    return CheckReport(len(rows), len(pictures), tuple(findings), passing)


def _sorted(error: UseError) -> str:
    message = str(error)
    return next((reason for words, reason in _READER_WORDS if words in message), "other")


def row_digest(sample: Sample) -> bytes:
    """16 bytes of what a row says and shows: turns, answers that are worse, and where its images and videos are."""
    media = (sample.images, sample.rejected_images, sample.videos)
    named = [None if group is None else [media_name(one) for one in group] for group in media]
    content = repr((sample.turns, sample.rejected_turns, named, sample.label, sample.boxes, sample.tools))
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def _repeated(readable: Sequence[tuple[int, Sample]]) -> list[Finding]:
    first: dict[bytes, str] = {}
    found = []
    for row, sample in readable:
        earlier = first.setdefault(row_digest(sample), sample.sample_id)
        if earlier != sample.sample_id:
            found.append(Finding(row, "repeated_row", f"{sample.sample_id}: the same as {earlier}"))
    return found


def _looked_at(row: int, sample: Sample, pictures: dict[Media, Picture]) -> list[Finding]:
    """What is wrong with a row's images, videos and boxes."""
    seen = [pictures[image] for image in images_of(sample)]
    found = [Finding(row, one.problem, f"{sample.sample_id}: {one.message}") for one in seen if one.problem]
    if not found:
        sizes = [(one.width_px, one.height_px) for one in seen[: len(sample.images)]]
        found = [
            Finding(row, "box_out_of_range", f"{sample.sample_id}: {problem}") for problem in wrong_boxes(sample, sizes)
        ]
    for video in sample.videos:
        try:
            read_video_header(video)
        except UseError as error:
            found.append(Finding(row, "broken_video", f"{sample.sample_id}: {error}"))
    return found


def _alike(readable: Sequence[tuple[int, Sample]], pictures: dict[Media, Picture], max_distance: int) -> list[Finding]:
    """Each image that is like an earlier one, once, with the row that shows it first."""
    shown_in: dict[Media, tuple[int, str]] = {}
    for row, sample in readable:
        for image in images_of(sample):
            shown_in.setdefault(image, (row, sample.sample_id))
    whole = [image for image, picture in pictures.items() if not picture.problem]
    same, alike = origins([pictures[image] for image in whole], max_distance)
    found = []
    for number, image in enumerate(whole):
        row, sample_id = shown_in[image]
        for reason, origin in (("duplicate_image", same[number]), ("near_duplicate_image", alike[number])):
            if origin != number:
                earlier = media_name(whole[origin])
                found.append(Finding(row, reason, f"{sample_id}: {media_name(image)} is like {earlier}"))
                break
    return found


def origins(pictures: Sequence[Picture], max_distance: int) -> tuple[list[int], list[int]]:
    """For each image the first one with the same bytes, and the first that it looks like; itself if there is none."""
    first: dict[bytes, int] = {}
    same = [first.setdefault(picture.digest, number) for number, picture in enumerate(pictures)]
    looks = np.frombuffer(b"".join(picture.looks for picture in pictures), dtype=np.uint8)
    return same, first_alike(looks.reshape(-1, HASH_BYTES), max_distance).tolist()


def _encode_problem(encoder: SampleEncoder, sample: Sample) -> tuple[str, str] | None:
    try:
        encoded = encoder.encode(sample)
    except TooLong as error:
        return "too_long", str(error)
    except UseError as error:
        return "does_not_encode", str(error)
    if encoded.cut:
        return "cut", f"{sample.sample_id}: cut ({encoded.cut})"
    if not encoder.learns(encoded):
        return "nothing_to_learn", f"{sample.sample_id}: no token with a weight"
    return None

"""Several images together by DALI, of whose calls each takes some time beside its work, however little it is given."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from megavlm.config.inputs import Grid
from megavlm.data import dali
from megavlm.data.augment import augmented
from megavlm.data.image_files import header_orientation, opened, png_has_late_metadata, seen_size
from megavlm.data.image_loading import ImageLoading
from megavlm.data.image_request import ImageRequest
from megavlm.data.image_spec import ImageSpec
from megavlm.data.image_views import View, cut_frames

MOST_IMAGES = 8
MOST_PIXELS = 16_000_000
"""Of images that are decoded together; what is larger is decoded alone."""


@dataclass(frozen=True)
class _Opened:
    """What an image's header says; `data` is its file, empty where it is `left_to_pil`."""

    request: ImageRequest
    orientation: int
    num_pixels: int
    image_format: str
    grid: Grid
    views: tuple[View, ...]
    left_to_pil: str
    data: bytes


def frames_by_dali(
    requests: Sequence[ImageRequest], spec: ImageSpec, loading: ImageLoading
) -> Iterator[tuple[list[np.ndarray], Grid] | str]:
    """Of each image its frames (tiles), uint8 [H, W, C], and its grid; or else why it is left to PIL: its kind.

    Args:
        requests: the images.
        spec: of the family.
        loading: where DALI works.

    Raises:
        UseError: as `images.load_frames`.
    """
    for together in _together(requests, spec):
        yield from _decoded(together, spec, loading)


def _together(requests: Sequence[ImageRequest], spec: ImageSpec) -> Iterator[list[_Opened]]:
    """Images that follow one another, as many as are decoded in one go."""
    batch: list[_Opened] = []
    for request in requests:
        one = _open(request, spec)
        num_pixels = sum(other.num_pixels for other in batch) + one.num_pixels
        if batch and (len(batch) == MOST_IMAGES or num_pixels > MOST_PIXELS):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _open(request: ImageRequest, spec: ImageSpec) -> _Opened:
    with request.named(), opened(request.path) as (file, image):
        orientation = header_orientation(image, file)
        size = seen_size(image, orientation)
        grid, views = request.layout(spec, size)
        kind = dali.left_to_pil(image, image.format == "PNG" and png_has_late_metadata(file))
        data = b""
        if not kind:
            file.seek(0)
            data = file.read()
        return _Opened(request, orientation, size[0] * size[1], str(image.format), grid, views, kind, data)


def _decoded(
    together: Sequence[_Opened], spec: ImageSpec, loading: ImageLoading
) -> Iterator[tuple[list[np.ndarray], Grid] | str]:
    ours = [one for one in together if not one.left_to_pil]
    pixels = dali.decode_together([(one.data, one.orientation) for one in ours], loading.device)
    found = {id(one): _shown(one, its) for one, its in zip(ours, pixels, strict=True) if its is not None}
    wanted = [(found[id(one)], view) for one in ours if id(one) in found for view in one.views]
    resized = iter(dali.resized_together(wanted, spec.resample, loading.device))
    for one in together:
        if id(one) in found:
            yield [frame for view in one.views for frame in cut_frames(view, next(resized))], one.grid
        else:
            yield one.left_to_pil or f"{one.image_format} that DALI cannot decode"


def _shown(one: _Opened, pixels: dali.Pixels) -> dali.Pixels:
    """An image as its row shows it: augmented, or as it is."""
    draw = one.request.draw
    if draw is None:
        return pixels
    return dali.as_pixels(np.asarray(augmented(Image.fromarray(dali.as_array(pixels)), draw)))

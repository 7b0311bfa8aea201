"""Random crops, colours and flips of training images: off unless a recipe asks for them.

What is drawn depends on the run's seed, the step and the image alone, so a resumed run, any number of workers and any
layout see the same pixels. The grid stays what the whole image has: a crop keeps the aspect ratio and is resized to it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from megavlm.data.sample import Sample

# Words that a mirrored picture would make wrong, and "right" in the sense of "correct", which cannot be told apart.
_SIDES = re.compile(
    r"\b(?:left|right|leftmost|rightmost|leftward|rightward|leftwards|rightwards|lefty|righty|east|west|eastern|western"
    r"|clockwise|counterclockwise|anticlockwise|port|starboard|mirror|mirrored|flip|flipped"
    r"|links|rechts|linke[nrsm]?|rechte[nrsm]?|gauche|droite?|izquierd[ao]|derech[ao]|esquerd[ao]|direit[ao]"
    r"|sinistr[ao]|destr[ao])\b|[左右東东西]|왼|오른|лев|прав",
    re.IGNORECASE,
)
# Coordinates that a text spells out itself: <box>..., <|box_start|>..., bbox_2d, [[12, 30, 40, 80]], (12, 30).
_COORDINATES = re.compile(
    r"<\|?(?:box|bbox|quad|ref|point|loc|patch_index)|bbox|point_2d|[\[(]\s*\d+(?:\.\d+)?\s*(?:,\s*\d+(?:\.\d+)?\s*)+[\])]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for each image of a training row.

    Attributes:
        crop_min_area: least share of an image's area that a crop keeps, up to 1; 1: no crops.
        color_jitter: brightness, contrast and saturation are each multiplied by 1 - this to 1 + this; 0: are not.
        flip_probability: of mirroring left and right; rows that name sides or places are never mirrored.
        seed: of the run.
    """

    crop_min_area: float = 1.0
    color_jitter: float = 0.0
    flip_probability: float = 0.0
    seed: int = 0

    @property
    def changes_something(self) -> bool:
        """Whether any of it is on."""
        return self.crop_min_area < 1 or self.color_jitter > 0 or self.flip_probability > 0


@dataclass(frozen=True)
class Draw:
    """What becomes of one image.

    Attributes:
        side: share of each side that is kept.
        left: where the crop begins, as a share of what is cut away in width.
        top: likewise in height.
        flip: whether it is mirrored.
        brightness: factor.
        contrast: factor.
        saturation: factor.
    """

    side: float = 1.0
    left: float = 0.0
    top: float = 0.0
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


def draw_for(augmentation: Augmentation, sample: Sample, step: int, index: int, number: int) -> Draw:
    """What becomes of an image at a step.

    Args:
        augmentation: of the run.
        sample: the row, whose text and boxes say what must not be done: a row with boxes, masks or coordinates is
            neither cropped nor mirrored, one that names sides is not mirrored.
        step: of the run, from 0.
        index: of the row in its data set.
        number: of the image in the row.
    """
    # All are drawn whatever the row allows, so that no draw depends on another's permission.
    generator = np.random.default_rng((augmentation.seed, step, index, number))
    area, left, top, mirrored = generator.uniform(size=4).tolist()
    colours = (1 + augmentation.color_jitter * generator.uniform(-1, 1, size=3)).tolist()
    texts = list(_texts(sample))
    placed = bool(sample.boxes or sample.masks) or any(_COORDINATES.search(text) for text in texts)
    flip = mirrored < augmentation.flip_probability and not placed and not any(map(_SIDES.search, texts))
    side = 1.0 if placed else (1 - area * (1 - augmentation.crop_min_area)) ** 0.5
    return Draw(side, left, top, flip, *colours)


def _texts(sample: Sample) -> Iterable[str]:
    for turn in (*sample.turns, *sample.rejected_turns):
        yield turn.text


def augmented(image: Image.Image, draw: Draw) -> Image.Image:
    """The image with a draw applied: RGB, perhaps smaller, of nearly the same aspect ratio."""
    if draw.side < 1:
        width, height = (max(1, round(side * draw.side)) for side in image.size)
        left, top = round((image.width - width) * draw.left), round((image.height - height) * draw.top)
        image = image.crop((left, top, left + width, top + height))
    if draw.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    enhancers = (
        (ImageEnhance.Brightness, draw.brightness),
        (ImageEnhance.Contrast, draw.contrast),
        (ImageEnhance.Color, draw.saturation),
    )
    for enhancer, factor in enhancers:
        if factor != 1:
            image = enhancer(image).enhance(factor)
    return image

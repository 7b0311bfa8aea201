"""How a family resizes, normalises and patchifies images, read from the model directory's image processor."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megavlm.config.inputs import Grid, InputSpec
from megavlm.data.anyres import anyres_grid
from megavlm.data.image_tiles import num_tiles
from megavlm.errors import use_error

MAX_ASPECT_RATIO = 200
"""Longer side over shorter side, beyond which a `dynamic` image is refused (as transformers does)."""

MAX_PADDED_PX = 10_000
"""Longest side of an image that is padded to a square (300 MB of bytes); transformers has no such limit."""

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3


@dataclass(frozen=True)
class ImageSpec:
    """How one family resizes, normalises and patchifies an image.

    Attributes:
        kind: `dynamic` (Qwen-VL: aspect ratio kept), `square` (CLIP: shorter side resized, centre cropped), `resized`
            (SigLIP: to a square, nothing cropped), `tiles` (InternVL: squares of one size, and a thumbnail) or
            `anyres` (LLaVA-NeXT: the whole as a square, and tiles of the padded image).
        patch_px: side of a patch in pixels.
        temporal_patch_size: how often a still image is repeated in a patch.
        merge_size: patches per visual token along each side; `dynamic` patches are ordered in such blocks.
        image_px: side of a `square` image or a tile in pixels; 0 for `dynamic`.
        resize_px: what the shorter side of a `square` image is resized to before the crop; 0 for `dynamic`.
        min_pixels: least area of a `dynamic` image in pixels; 0 for `square`.
        max_pixels: largest area of a `dynamic` image in pixels; 0 for `square`.
        mean: subtracted per colour (red, green, blue) after rescaling.
        std: divided by per colour.
        rescale: factor from 0..255 to 0..1.
        resample: PIL's number of the resampling filter (3: bicubic).
        min_tiles: fewest `tiles` of an image, without the thumbnail.
        max_tiles: most `tiles` of an image, without the thumbnail.
        tile_sizes: of `anyres`, (height, width) in pixels.
        tiles_alone: of `anyres`, whether only an image that is alone in its row has tiles.
    """

    kind: Literal["dynamic", "square", "resized", "tiles", "anyres"]
    patch_px: int
    temporal_patch_size: int
    merge_size: int
    image_px: int
    resize_px: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float
    resample: int
    min_tiles: int = 1
    max_tiles: int = 1
    tile_sizes: tuple[tuple[int, int], ...] = ()
    tiles_alone: bool = False

    def has_tiles(self, num_images: int) -> bool:
        """Whether an `anyres` image of a row with so many images has tiles."""
        return not self.tiles_alone or num_images == 1


def read_image_spec(hf_dir: str | Path, inputs: InputSpec, min_pixels: int = 0, max_pixels: int = 0) -> ImageSpec:
    """Read the image processor of a Hugging Face directory.

    Args:
        hf_dir: holds preprocessor_config.json, or processor_config.json with an `image_processor` section.
        inputs: the family's facts, which the files must agree with.
        min_pixels: overrides the directory's least area of a `dynamic` image; 0 keeps it.
        max_pixels: overrides the directory's largest area of a `dynamic` image; 0 keeps it.

    Raises:
        UseError: no such file, a step switched off (`do_resize: false`), or sizes unlike the model's.
    """
    where, config = _read_processor_config(Path(hf_dir))
    steps = ["do_resize", "do_rescale", "do_normalize", "do_convert_rgb"]
    for key in steps + (["do_center_crop"] if inputs.image_kind == "square" else []):
        if config.get(key, True) is not True:
            raise use_error(f"{where} {key}", config[key], "true", "use the image processor that the model came with")
    if inputs.image_kind == "dynamic":
        expected = {
            "patch_size": inputs.patch_px,
            "temporal_patch_size": inputs.temporal_patch_size,
            "merge_size": inputs.merge_size,
        }
        for key, value in expected.items():
            if config.get(key, value) != value:
                raise use_error(f"{where} {key}", config[key], f"{value} as in config.json", "make the two files agree")
        least, most = _pixel_limits(config, where, min_pixels, max_pixels)
        image_px = resize_px = 0
    else:
        least = most = 0
        sizes = {"square": _square_sizes, "anyres": _anyres_sizes}.get(inputs.image_kind, _tile_sizes)
        image_px, resize_px = sizes(config, where, inputs.image_px)
    if inputs.image_kind == "anyres":
        _check_tile_sizes(config, where, inputs)
    return ImageSpec(
        kind=inputs.image_kind,
        patch_px=inputs.patch_px,
        temporal_patch_size=inputs.temporal_patch_size,
        merge_size=inputs.merge_size,
        image_px=image_px,
        resize_px=resize_px,
        min_pixels=least,
        max_pixels=most,
        mean=three_floats(config, where, "image_mean", _CLIP_MEAN),
        std=three_floats(config, where, "image_std", _CLIP_STD),
        rescale=float(config.get("rescale_factor", 1 / 255)),
        resample=int(config.get("resample", _BICUBIC)),
        min_tiles=int(config.get("min_patches", 1)),
        max_tiles=int(config.get("max_patches", 12)),
        tile_sizes=inputs.tile_sizes,
        tiles_alone=inputs.tiles_alone,
    )


def find_processor_config(hf_dir: Path, *places: tuple[str, str | None]) -> tuple[str, dict[str, Any]] | None:
    """The first of some places that has a processor's settings, and where that is; None: none has.

    Args:
        hf_dir: Hugging Face directory.
        *places: file name, and the section of the file (None: the whole of it).

    Raises:
        UseError: a file that is no JSON.
    """
    for name, section in places:
        path = hf_dir / name
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise use_error(str(path), str(error), "a JSON object", "copy the file from the model again") from error
        config = config.get(section) if section else config
        if isinstance(config, dict):
            return str(path), config
    return None


def _read_processor_config(hf_dir: Path) -> tuple[str, dict[str, Any]]:
    found = find_processor_config(
        hf_dir, ("preprocessor_config.json", None), ("processor_config.json", "image_processor")
    )
    if found is None:
        raise use_error(
            str(hf_dir),
            "no image processor",
            "preprocessor_config.json, or processor_config.json with an image_processor section",
            "copy them from the model's Hugging Face directory",
        )
    return found


def _pixel_limits(config: dict[str, Any], where: str, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    size = config.get("size")
    size = size if isinstance(size, dict) else {}
    # Older files say min_pixels / max_pixels (at the top or inside size), newer ones shortest_edge / longest_edge.
    least = min_pixels or config.get("min_pixels") or size.get("min_pixels") or size.get("shortest_edge")
    most = max_pixels or config.get("max_pixels") or size.get("max_pixels") or size.get("longest_edge")
    if not isinstance(least, int) or not isinstance(most, int):
        raise use_error(
            f"{where} size",
            size,
            "shortest_edge and longest_edge (or min_pixels and max_pixels), areas in pixels",
            "add them, or set data.min_pixels and data.max_pixels",
        )
    if not 0 < least <= most:
        raise use_error(
            "data.min_pixels, data.max_pixels", f"{least}, {most}", "0 < min_pixels <= max_pixels", "change one of them"
        )
    return least, most


def _square_sizes(config: dict[str, Any], where: str, image_px: int) -> tuple[int, int]:
    crop, size = config.get("crop_size"), config.get("size")
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    size = {"shortest_edge": size} if isinstance(size, int) else size
    if crop != {"height": image_px, "width": image_px}:
        raise use_error(
            f"{where} crop_size",
            crop,
            f"height and width {image_px}, the vision tower's image_size",
            "make the two files agree",
        )
    shortest = size.get("shortest_edge") if isinstance(size, dict) else None
    if not isinstance(shortest, int) or shortest < image_px:
        raise use_error(
            f"{where} size", size, f"shortest_edge of at least {image_px}", "use the model's own image processor"
        )
    return image_px, shortest


def _tile_sizes(config: dict[str, Any], where: str, image_px: int) -> tuple[int, int]:
    size = config.get("size", {"height": 384, "width": 384})
    if size != {"height": image_px, "width": image_px}:
        raise use_error(
            f"{where} size",
            size,
            f"height and width {image_px}, the vision tower's image_size",
            "make the two files agree",
        )
    return image_px, 0


def _anyres_sizes(config: dict[str, Any], where: str, image_px: int) -> tuple[int, int]:
    """LLaVA-NeXT's processor crops what is a square already, OneVision's does not."""
    if "crop_size" in config and config["crop_size"] is not None:
        _, shortest = _square_sizes(config, where, image_px)
        if shortest != image_px:
            raise use_error(
                f"{where} size",
                shortest,
                f"shortest_edge {image_px}, a tile's side",
                "use the model's own image processor",
            )
        return image_px, 0
    return _tile_sizes(config, where, image_px)


def _check_tile_sizes(config: dict[str, Any], where: str, inputs: InputSpec) -> None:
    found = config.get("image_grid_pinpoints")
    if found is not None and tuple(map(tuple, found)) != inputs.tile_sizes:
        raise use_error(
            f"{where} image_grid_pinpoints",
            f"{len(found)} sizes",
            f"the {len(inputs.tile_sizes)} of config.json",
            "make the two files agree",
        )


def three_floats(
    config: dict[str, Any], where: str, key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    """A setting of three numbers, one a colour.

    Raises:
        UseError: it is something else.
    """
    values = config.get(key, default)
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise use_error(f"{where} {key}", values, "three numbers", "use the model's own image processor")
    return float(values[0]), float(values[1]), float(values[2])


def target_grid(spec: ImageSpec, width_px: int, height_px: int, num_images: int = 1) -> Grid:
    """The patch grid that an image of this size will have; needs no pixels.

    Args:
        spec: of the family.
        width_px: of the image.
        height_px: of the image.
        num_images: of its row.

    Raises:
        UseError: a `dynamic` image whose sides differ by more than a factor of 200, or one that is padded to a square
            and longer than `MAX_PADDED_PX`.
    """
    if spec.kind != "dynamic":
        side = spec.image_px // spec.patch_px
        if spec.kind == "anyres":
            if not spec.has_tiles(num_images):
                if max(width_px, height_px) > MAX_PADDED_PX:
                    raise use_error(
                        "image size",
                        f"{width_px} x {height_px} pixels",
                        f"sides of at most {MAX_PADDED_PX} pixels in a row with several images",
                        "crop the image or drop the row",
                    )
                return 1, side, side, 0, 0, 0
            return anyres_grid(width_px, height_px, spec.tile_sizes, spec.image_px, side)
        limits = spec.min_tiles, spec.max_tiles
        return (num_tiles(width_px, height_px, spec.image_px, *limits) if spec.kind == "tiles" else 1), side, side
    if max(width_px, height_px) / min(width_px, height_px) > MAX_ASPECT_RATIO:
        raise use_error(
            "image size",
            f"{width_px} x {height_px} pixels",
            f"an aspect ratio of at most {MAX_ASPECT_RATIO}",
            "crop the image or drop the row",
        )
    height, width = _smart_resize(spec, height_px, width_px)
    return 1, height // spec.patch_px, width // spec.patch_px


def _smart_resize(spec: ImageSpec, height: int, width: int) -> tuple[int, int]:
    """Sides as multiples of a merged patch, area within the limits, aspect ratio nearly kept (Qwen2-VL)."""
    factor = spec.patch_px * spec.merge_size
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > spec.max_pixels:
        shrink = math.sqrt(height * width / spec.max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < spec.min_pixels:
        grow = math.sqrt(spec.min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width

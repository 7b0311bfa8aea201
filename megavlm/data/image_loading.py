"""Who decodes and resizes images in a run, and what else a recipe says of their loading."""

from dataclasses import dataclass
from typing import Literal

from megavlm.data.augment import Augmentation
from megavlm.errors import use_error
from megavlm.platform.capabilities import probe, require

DALI_RESAMPLES = {1: "INTERP_LANCZOS3", 2: "INTERP_LINEAR", 3: "INTERP_CUBIC"}
"""DALI's name of a resampling filter, by PIL's number."""


@dataclass(frozen=True)
class ImageLoading:
    """How images are loaded.

    Attributes:
        backend: who decodes and resizes; PIL is the reference.
        device: where DALI does.
        jpeg_draft: whether PIL may decode a JPEG at a half, a quarter or an eighth of its size where that is still
            no smaller than what is made of it: faster, but other pixels.
        augmentation: of training images; None: as they are.
    """

    backend: Literal["pil", "dali"] = "pil"
    device: Literal["cpu", "gpu"] = "cpu"
    jpeg_draft: bool = False
    augmentation: Augmentation | None = None


BY_PIL = ImageLoading()


def choose_backend(asked: Literal["auto", "pil", "dali"], device: Literal["cpu", "gpu"]) -> Literal["pil", "dali"]:
    """The backend of a run: `auto` is PIL unless there are both CUDA and DALI.

    Args:
        asked: what the recipe says.
        device: where DALI is to work.

    Raises:
        UseError: DALI was asked for and is not there, or is to work on a GPU that is not there.
    """
    if asked == "pil" or (asked == "auto" and not (probe("cuda").available and probe("nvidia-dali").available)):
        return "pil"
    require("nvidia-dali")
    if device == "gpu":
        require("cuda")
    return "dali"


def check_resample(loading: ImageLoading, resample: int) -> None:
    """Refuse a filter that the backend lacks.

    Args:
        loading: of the run.
        resample: PIL's number of the model's filter.

    Raises:
        UseError: DALI has no such filter.
    """
    if loading.backend == "dali" and resample not in DALI_RESAMPLES:
        raise use_error(
            "the image processor's resample",
            f"{resample} with data.image_backend=dali",
            "1 (Lanczos), 2 (bilinear) or 3 (bicubic)",
            "set data.image_backend=pil",
        )

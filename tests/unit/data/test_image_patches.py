import numpy as np
import pytest
import torch

from megavlm.data.image_patches import PART_BYTES, PixelBytes, cut_patches, normalised, patch_format
from megavlm.data.image_spec import ImageSpec

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SPEC = ImageSpec("dynamic", 4, 2, 2, 0, 0, 0, 0, MEAN, STD, 1 / 255, 3)
STILL, VIDEO = patch_format(SPEC), patch_format(SPEC, is_video=True)


def noise(num_bytes):
    return torch.from_numpy(np.random.default_rng(num_bytes).integers(0, 256, num_bytes, dtype=np.uint8))


def by_arithmetic(values_B, patches):
    """As transformers' processors compute: images rescaled first, videos with mean and deviation rescaled."""
    levels = values_B.view(-1, 3, patches.num_frames, 16)
    mean, std = (torch.tensor(three)[:, None, None] for three in (MEAN, STD))
    if patches.is_video:
        values = (levels.float() - mean * (1.0 / patches.rescale)) / (std * (1.0 / patches.rescale))
    else:
        values = ((levels.double() * patches.rescale).float() - mean) / std
    return values.repeat(1, 1, patches.repeats, 1).flatten(1)


@pytest.mark.parametrize("patches", [STILL, VIDEO], ids=["image", "video"])
def test_the_table_is_the_arithmetic_to_the_last_bit(patches):
    number = 2 * PART_BYTES // patches.patch_bytes + 3  # more than two parts
    values_B = noise(number * patches.patch_bytes)
    assert len(values_B.view(-1, 3, patches.num_frames * 16)[:, 0].unique()) == 256
    actual = normalised(PixelBytes(values_B, ((patches, number),), 96))
    assert actual.shape == (number, 96) and torch.equal(actual, by_arithmetic(values_B, patches))


def test_images_and_videos_of_one_microbatch_keep_their_own_formats():
    runs = ((STILL, 5), (VIDEO, 3), (STILL, 2))
    parts = [noise(patches.patch_bytes * number) for patches, number in runs]
    actual = normalised(PixelBytes(torch.cat(parts), runs, 96))
    expected = [by_arithmetic(part, patches) for part, (patches, _) in zip(parts, runs, strict=True)]
    assert torch.equal(actual, torch.cat(expected))


def test_no_image_has_no_patches():
    assert normalised(PixelBytes(torch.empty(0, dtype=torch.uint8), (), 96)).shape == (0, 96)


def test_a_videos_frames_lie_side_by_side_in_a_patch():
    frames = [np.full((8, 16, 3), (number, 10 + number, 20 + number), dtype=np.uint8) for number in range(4)]
    values_B = torch.empty(2 * 2 * 4 * VIDEO.patch_bytes, dtype=torch.uint8)
    cut_patches(frames, SPEC, VIDEO, 2, 4, values_B)
    shown = values_B.view(2, 8, 3, 2, 16)
    for group in range(2):
        for colour in range(3):
            for frame in range(2):
                assert (shown[group, :, colour, frame] == 10 * colour + 2 * group + frame).all()

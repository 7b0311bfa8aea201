"""What a model family tells the data room about its inputs: plain facts, no code.

A family's config mapper fills an `InputSpec` from an HF directory's config; `data` prepares samples by it.
"""

import math
from dataclasses import dataclass
from typing import Literal

Grid = tuple[int, ...]
"""Patches of an image: frames (or tiles), and rows and columns of each. An `anyres` image has three numbers more: tiles
side by side, and rows and columns of patches that are left when the tiles are joined and padding is cut off (0, 0, 0
for an image without tiles; 0 and rows and columns of a frame's visual tokens for a video)."""

BoxFormat = Literal[
    "",
    "qwen_tokens_1000",
    "qwen_tokens_pixels",
    "json_1000",
    "json_pixels",
    "numbers",
    "bin_tokens_1000",
    "grid_tokens_32",
]
"""How boxes are written in texts; see `data/boxes.py`."""


def is_pooled_video(grid: Grid) -> bool:
    """Whether an `anyres` grid is of a video."""
    return grid[3] == 0 and grid[4] > 0


@dataclass(frozen=True)
class InputSpec:
    """How images become tokens, and tokens get positions, in one model family.

    Attributes:
        image_token_id: id of the placeholder token; each image becomes `num_image_tokens` copies of it.
        vocab_size: ids must be below this.
        image_kind: `dynamic` keeps the aspect ratio, sides multiples of patch_px * merge_size (Qwen-VL);
            `square` resizes the shorter side to image_px and crops the centre (CLIP in LLaVA-1.5);
            `resized` makes it image_px high and wide, whatever it was (SigLIP);
            `tiles` cuts the image into squares of image_px, each a frame of its grid (InternVL);
            `anyres` pads it to one of tile_sizes and cuts that, behind the whole image as a square (LLaVA-NeXT).
        patch_px: side of a patch in pixels.
        temporal_patch_size: frames per patch; a still image is repeated that often. 1 where there is no such axis.
        merge_size: patches per visual token along each side; 1 means one token a patch.
        image_px: side of a `square` image or a tile in pixels; 0 for `dynamic`.
        has_borders: whether tokens of their own stand in front of and behind an image's (InternVL); which ones, the
            tokenizer says.
        num_queries: visual tokens of a frame behind a connector with learned queries; 0: follows from the patches.
        position_kind: `linear` positions count tokens; `mrope` gives (temporal, height, width) positions.
        tile_sizes: of `anyres`, (height, width) in pixels, multiples of image_px.
        max_tile_area: joined tiles of `anyres` are shrunk when they are clearly larger than so many tiles; 0: never.
        tiles_alone: whether only an image that is alone in its row has tiles; others are padded to squares.
        video_kind: `none` takes no videos; `timed` gives frames positions that follow their time (Qwen2.5-VL);
            `stamped` writes the time in front of each temporal patch (Qwen3-VL); `pooled` halves the visual tokens of
            a frame along each side (LLaVA-OneVision).
        video_token_id: id of a video's placeholder in the chat template. Encoded, its visual tokens are copies of
            image_token_id: behind the data room a video is an image of several frames.
        frame_border_ids: tokens in front of and behind each temporal patch of a `stamped` video.
        tokens_per_second: positions that a `timed` video's frames are apart when a second lies between them.
    """

    image_token_id: int
    vocab_size: int
    image_kind: Literal["dynamic", "square", "resized", "tiles", "anyres"]
    patch_px: int
    temporal_patch_size: int
    merge_size: int
    image_px: int
    position_kind: Literal["linear", "mrope"]
    num_queries: int = 0
    has_borders: bool = False
    tile_sizes: tuple[tuple[int, int], ...] = ()
    max_tile_area: int = 0
    tiles_alone: bool = False
    video_kind: Literal["none", "timed", "stamped", "pooled"] = "none"
    video_token_id: int = -1
    frame_border_ids: tuple[int, ...] = ()
    tokens_per_second: int = 1

    def num_image_tokens(self, grid: Grid) -> int:
        """Visual tokens of one image."""
        frames, rows, columns = grid[:3]
        if self.image_kind == "anyres" and is_pooled_video(grid):
            return frames * grid[4] * grid[5] + 1
        if self.image_kind == "anyres":
            height, width = self.joined_size(grid)
            return rows * columns + height * (width + 1) if frames > 1 else rows * columns + 1
        if self.num_queries:
            return frames * self.num_queries
        return frames * (rows // self.merge_size) * (columns // self.merge_size)

    def joined_size(self, grid: Grid) -> tuple[int, int]:
        """Rows and columns of visual tokens of an `anyres` image's joined tiles.

        Source: LLaVA-OneVision, arXiv 2408.03326, section 3.1 (shrinking); transformers' llava_onevision.
        """
        side, (height, width) = grid[1], grid[4:]
        if self.max_tile_area:
            ratio = math.sqrt(height * width / (self.max_tile_area * side**2))
            if ratio > 1.1:
                return int(height // ratio), int(width // ratio)
        return height, width

    @property
    def patch_channels(self) -> int:
        """Values of one flattened patch: 3 colours x frames x rows x columns."""
        return 3 * self.temporal_patch_size * self.patch_px**2

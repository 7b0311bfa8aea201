"""What a model family tells the data room about its inputs: plain facts, no code.

A family's config mapper fills an `InputSpec` from an HF directory's config; `data` prepares samples by it.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class InputSpec:
    """How images become tokens, and tokens get positions, in one model family.

    Attributes:
        image_token_id: id of the placeholder token; each image becomes `num_image_tokens` copies of it.
        vocab_size: ids must be below this.
        image_kind: `dynamic` keeps the aspect ratio, sides multiples of patch_px * merge_size (Qwen-VL);
            `square` resizes the shorter side to image_px and crops the centre (CLIP in LLaVA-1.5);
            `resized` makes it image_px high and wide, whatever it was (SigLIP);
            `tiles` cuts the image into squares of image_px, each a frame of its grid (InternVL).
        patch_px: side of a patch in pixels.
        temporal_patch_size: frames per patch; a still image is repeated that often. 1 where there is no such axis.
        merge_size: patches per visual token along each side; 1 means one token a patch.
        image_px: side of a `square` image or a tile in pixels; 0 for `dynamic`.
        has_borders: whether tokens of their own stand in front of and behind an image's (InternVL); which ones, the
            tokenizer says.
        num_queries: visual tokens of a frame behind a connector with learned queries; 0: follows from the patches.
        position_kind: `linear` positions count tokens; `mrope` gives (temporal, height, width) positions.
    """

    image_token_id: int
    vocab_size: int
    image_kind: Literal["dynamic", "square", "resized", "tiles"]
    patch_px: int
    temporal_patch_size: int
    merge_size: int
    image_px: int
    position_kind: Literal["linear", "mrope"]
    num_queries: int = 0
    has_borders: bool = False

    def num_image_tokens(self, grid_thw: tuple[int, int, int]) -> int:
        """Visual tokens of one image whose patch grid is (frames, rows, columns)."""
        frames, rows, columns = grid_thw
        if self.num_queries:
            return frames * self.num_queries
        return frames * (rows // self.merge_size) * (columns // self.merge_size)

    @property
    def patch_channels(self) -> int:
        """Values of one flattened patch: 3 colours x frames x rows x columns."""
        return 3 * self.temporal_patch_size * self.patch_px**2

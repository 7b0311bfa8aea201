"""What both sides are fed: samples as tokens and patches, several of them to a packed row.

Imports no megatron: it is used in the pytest process and in the workers.

Shape suffixes: S tokens of one sample, P patches, C values of a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megavlm.config.inputs import Grid, InputSpec
from megavlm.data.anyres import anyres_grid
from megavlm.data.packing import pack
from megavlm.data.positions import linear_positions, mrope_positions
from megavlm.data.sample import Batch, EncodedSample
from megavlm.data.token_weights import RESPONSE

# A number of text tokens, or an image: its patch rows and columns, or its tiles, and rows and columns of each; or, of
# an image on tiles (anyres), its height and width in pixels.
Part = int | Grid


@dataclass(frozen=True)
class Item:
    """A sample with its pixels: `patches_PC` of all its images (perhaps 0 rows), and their (height, width)."""

    encoded: EncodedSample
    patches_PC: torch.Tensor
    image_sizes: tuple[tuple[int, int], ...] = ()

    @property
    def grid_thw_N3(self) -> torch.Tensor:
        return torch.tensor(self.encoded.grids_thw, dtype=torch.int64).reshape(len(self.encoded.grids_thw), -1)


def pack_items(items: Sequence[Item], patch_channels: int, sample_multiple: int, total_multiple: int) -> Batch:
    """The packed row of these samples."""
    return pack(
        [item.encoded for item in items],
        [item.patches_PC for item in items],
        sample_multiple=sample_multiple,
        total_multiple=total_multiple,
        pad_token_id=0,
        patch_channels=patch_channels,
    )


def item_of(parts: Sequence[Part], inputs: InputSpec, generator: torch.Generator) -> Item:
    """A random sample: random words, noise for pixels, weights of 0, 0.5 and 1 on its words."""
    tokens, weights, grids, sizes = [], [], [], []
    num_images = sum(not isinstance(part, int) for part in parts)
    for part in parts:
        if isinstance(part, int):
            tokens.append(torch.randint(20, inputs.vocab_size, (part,), generator=generator))
            weights.append(torch.tensor([0.0, 0.5, 1.0])[torch.randint(3, (part,), generator=generator)])
        else:
            if inputs.image_kind == "anyres":
                sizes.append((part[0], part[1]))
                grids.append(_anyres(part, inputs, num_images))
            else:
                grids.append(part if len(part) == 3 else (1, *part))
            num_tokens = inputs.num_image_tokens(grids[-1])
            tokens.append(torch.full((num_tokens,), inputs.image_token_id))
            weights.append(torch.zeros(num_tokens))
    tokens_S = torch.cat(tokens).numpy()
    num_patches = sum(frames * rows * columns for frames, rows, columns, *_ in grids)
    encoded = EncodedSample(
        sample_id=str(list(parts)),
        tokens_S=tokens_S,
        token_classes_S=np.full(len(tokens_S), RESPONSE, dtype=np.int8),
        scales_S=torch.cat(weights).numpy(),
        position_ids_3S=_positions(tokens_S, inputs, grids),
        images=(),
        grids_thw=tuple(grids),
    )
    return Item(encoded, torch.randn(num_patches, inputs.patch_channels, generator=generator), tuple(sizes))


def _anyres(size: Grid, inputs: InputSpec, num_images: int) -> Grid:
    side = inputs.image_px // inputs.patch_px
    if inputs.tiles_alone and num_images > 1:
        return 1, side, side, 0, 0, 0
    return anyres_grid(size[1], size[0], inputs.tile_sizes, inputs.image_px, side)


def _positions(tokens_S: np.ndarray, inputs: InputSpec, grids: list[Grid]) -> np.ndarray:
    if inputs.position_kind == "linear":
        return linear_positions(len(tokens_S))
    return mrope_positions(tokens_S, inputs.image_token_id, grids, inputs.merge_size)


# Lengths are odd and even, so that sequence parallelism has something to pad.
DYNAMIC_ROWS: dict[str, list[list[Part]]] = {
    "one image": [[5, (4, 6), 10]],
    "several images": [[3, (4, 6), 4, (2, 2), 1, (8, 4), 2, (6, 10), 6]],
    "image first": [[(4, 4), 8]],
    "image last": [[9, (2, 6)]],
    "long image": [[2, (2, 20), 4]],
    "text only": [[23]],
    "mixed": [[12], [4, (4, 6), 7], [(2, 4), 5], [1], [6, (2, 2), 2, (4, 4), 3], [20], [3, (6, 6)]],
}
SQUARE_ROWS: dict[str, list[list[Part]]] = {
    "one image": [[5, (4, 4), 10]],
    "several images": [[3, (4, 4), 4, (4, 4), (4, 4), 6]],
    "image first": [[(4, 4), 8]],
    "image last": [[9, (4, 4)]],
    "text only": [[23]],
    "mixed": [[12], [4, (4, 4), 7], [(4, 4), 5], [1], [6, (4, 4), 2, (4, 4), 3], [20], [3, (4, 4)]],
}


TILE_ROWS: dict[str, list[list[Part]]] = {
    "one image": [[5, (3, 4, 4), 10]],
    "several images": [[3, (1, 4, 4), 4, (5, 4, 4), (1, 4, 4), 6]],
    "image first": [[(4, 4), 8]],
    "image last": [[9, (3, 4, 4)]],
    "text only": [[23]],
    "mixed": [[12], [4, (3, 4, 4), 7], [(4, 4), 5], [1], [6, (7, 4, 4), 2, (4, 4), 3], [20], [3, (4, 4)]],
}
ANYRES_ROWS: dict[str, list[list[Part]]] = {
    "one image": [[5, (64, 96), 10]],
    "several images": [[3, (28, 28), 4, (100, 30), (57, 50), 6]],
    "image first": [[(20, 90), 8]],
    "image last": [[9, (61, 60)]],
    "text only": [[23]],
    "mixed": [[12], [4, (90, 85), 7], [(31, 90), 5], [1], [6, (40, 44), 2, (90, 33), 3], [20], [3, (56, 56)]],
}
KINDS = {
    "anyres": ANYRES_ROWS,
    "dynamic": DYNAMIC_ROWS,
    "square": SQUARE_ROWS,
    "resized": SQUARE_ROWS,
    "tiles": TILE_ROWS,
}


def synthetic_rows(inputs: InputSpec) -> dict[str, list[Item]]:
    """Named packed rows for a family, always the same."""
    generator = torch.Generator().manual_seed(7)
    table = KINDS[inputs.image_kind]
    return {name: [item_of(parts, inputs, generator) for parts in samples] for name, samples in table.items()}

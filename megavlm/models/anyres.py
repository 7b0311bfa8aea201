"""A connector for images on tiles: their features are joined, cut to the image, and broken into lines (LLaVA-NeXT).

Frames of a video have no tiles, and their features are made smaller (LLaVA-OneVision).

Source: LLaVA-NeXT (https://llava-vl.github.io/blog/2024-01-30-llava-next) and LLaVA-OneVision, arXiv 2408.03326;
checked against transformers' llava_next and llava_onevision.

Shape suffixes: P patches, D tower hidden size, V visual tokens, K slots (one here), H language hidden size, N images,
G numbers of a grid, R rows and C columns of joined tiles or of a frame, F frames.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megavlm.config.inputs import Grid, InputSpec, is_pooled_video


class AnyresConnector(MegatronModule):
    """A connector patch by patch, and a learned token at the end of every line."""

    def __init__(self, config: TransformerConfig, inputs: InputSpec, main: nn.Module, size: int) -> None:
        super().__init__(config=config)
        self.inputs, self.main = inputs, main
        self.newline = nn.Parameter(torch.zeros(size, dtype=config.params_dtype))

    def forward(self, hiddens_PD: list[torch.Tensor], grid_NG: torch.Tensor) -> torch.Tensor:
        """The tower's hidden state, and every image's grid, to features [V, 1, H]."""
        features_PH = self.main(hiddens_PD[0])
        grids = [tuple(grid) for grid in grid_NG.tolist()]
        each = features_PH.split([frames * rows * columns for frames, rows, columns, *_ in grids])
        return torch.cat([self._joined(image_PH, grid) for image_PH, grid in zip(each, grids, strict=True)])[:, None]

    def _joined(self, image_PH: torch.Tensor, grid: Grid) -> torch.Tensor:
        """One image's features: the whole, then the tiles line by line; of a video, its frames made smaller."""
        frames, side, _, tile_columns, rows, columns = grid
        newline_1H = self.newline[None].to(image_PH.dtype)
        if is_pooled_video(grid):
            frames_FHRC = image_PH.unflatten(0, (frames, side, side)).permute(0, 3, 1, 2)
            pooled_FHRC = F.interpolate(frames_FHRC, (rows, columns), mode="bilinear")
            return torch.cat((pooled_FHRC.permute(0, 2, 3, 1).flatten(0, 2), newline_1H))
        if frames == 1:
            return torch.cat((image_PH, newline_1H))
        whole_PH, tiles_PH = image_PH.split([side**2, (frames - 1) * side**2])
        # -> tile row, row in tile, tile column, column in tile
        tiles = tiles_PH.unflatten(0, (-1, tile_columns, side, side)).transpose(1, 2)
        joined_RCH = tiles.flatten(2, 3).flatten(0, 1)
        top, left = (joined_RCH.shape[0] - rows) // 2, (joined_RCH.shape[1] - columns) // 2
        joined_RCH = joined_RCH[top : top + rows, left : left + columns]
        size = self.inputs.joined_size(grid)
        if size != (rows, columns):
            joined_RCH = F.interpolate(joined_RCH.permute(2, 0, 1)[None], size, mode="bilinear")[0].permute(1, 2, 0)
        ends = newline_1H.expand(len(joined_RCH), 1, -1)
        return torch.cat((whole_PH, torch.cat((joined_RCH, ends), dim=1).flatten(0, 1)))

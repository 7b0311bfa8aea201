"""An image that a row wants, and how it is laid out."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from megavlm.config.inputs import Grid
from megavlm.data.augment import Draw
from megavlm.data.image_files import BROKEN_IMAGE_ERRORS, broken_image
from megavlm.data.image_spec import ImageSpec, target_grid
from megavlm.data.image_views import View, image_views
from megavlm.data.media import media_name
from megavlm.data.sample import Media
from megavlm.errors import UseError, use_error


@dataclass(frozen=True)
class ImageRequest:
    """An image that is to be decoded.

    Attributes:
        path: where it is.
        num_images: of its row.
        grid: the one it had when its row was looked at; None: it is not known.
        draw: how it is augmented; the grid is that of the whole image.
        row: what messages call its row; empty: they name the file alone.
    """

    path: Media
    num_images: int = 1
    grid: Grid | None = None
    draw: Draw | None = None
    row: str = ""

    def layout(self, spec: ImageSpec, size: tuple[int, int]) -> tuple[Grid, tuple[View, ...]]:
        """Its grid, and the views that its frames are cut from.

        Args:
            spec: of the family.
            size: (width, height) in pixels as it is seen.

        Raises:
            UseError: the family refuses its sides, or it is not what it was.
        """
        grid = target_grid(spec, *size, self.num_images)
        if self.grid is not None and grid != self.grid:
            raise use_error(
                "its size",
                f"a grid of patches {grid}",
                f"{self.grid} as when its row was read",
                "do not change images during a run",
            )
        return grid, image_views(spec, *size, grid[1], grid[2], self.num_images)

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """What goes wrong inside is a UseError that names the row and the image."""
        row = f"{self.row}: " if self.row else ""
        try:
            yield
        except UseError as error:
            raise UseError(f"{row}{media_name(self.path)}: {error}") from error
        except BROKEN_IMAGE_ERRORS as error:
            raise UseError(f"{row}{broken_image(self.path, error)}") from error

"""What a step works on: the lengths of a typical global batch, cut into the microbatches that a layout would see.

Lengths come from the recipe's rows or from a CSV file. The batch is drawn from them at even steps of their order, so
that it has the same mix.

Shape suffixes: M microbatches, N samples.
"""

import csv
import functools
import gzip
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megavlm.config.inputs import Grid, InputSpec
from megavlm.data.balance import SampleCosts, split
from megavlm.errors import use_error
from megavlm.models.architecture import Architecture
from megavlm.planner.flops import head_flops, image_flops, language_flops, layer_flops

TILE_PX = 448
TILE_TOKENS = 256


@dataclass(frozen=True)
class Sample:
    """A row of the data: all its tokens, and the patch grids of its images."""

    num_tokens: int
    grids: tuple[Grid, ...] = ()


@dataclass(frozen=True)
class Cut:
    """How a global batch becomes microbatches.

    Attributes:
        data: data ranks.
        samples: samples of a microbatch, in their order; 0: split by cost into packs.
        packing_length: most tokens of a pack.
        multiple: of the number of microbatches.
        padding: tokens that each sample is padded to a multiple of.
    """

    data: int
    samples: int
    packing_length: int
    multiple: int
    padding: int


@dataclass(frozen=True)
class Pack:
    """A microbatch of one data rank.

    Attributes:
        lengths: tokens of its samples, padded.
        grids: its images.
        image_flops: forward of each image before the language model.
        layer_flops: forward of one decoder layer, of the lower half of attention; a mean, where some read images.
        head_flops: forward of the output layer.
        num_visual_tokens: of its images.
        num_patches: of its images.
    """

    lengths: tuple[int, ...]
    grids: tuple[Grid, ...]
    image_flops: tuple[float, ...]
    layer_flops: float
    head_flops: float
    num_visual_tokens: int
    num_patches: int

    @property
    def num_tokens(self) -> int:
        """Of the row."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Batch:
    """A global batch under a cut.

    Attributes:
        packs: by data rank and microbatch.
        fullest: the data rank with the most work, which all the others wait for.
        round_image_flops_M: forward of all images of each microbatch, over all data ranks.
        largest_image_flops: forward of the largest image.
        round_patches_M: patches of all images of each microbatch, over all data ranks.
    """

    packs: tuple[tuple[Pack, ...], ...]
    fullest: tuple[Pack, ...]
    round_image_flops_M: np.ndarray
    largest_image_flops: float
    round_patches_M: np.ndarray

    @property
    def num_microbatches(self) -> int:
        """M."""
        return len(self.fullest)


@dataclass(frozen=True)
class Workload:
    """A typical global batch of a model.

    Attributes:
        architecture: of the model.
        samples: of one global batch.
        max_length: longest sample.
    """

    architecture: Architecture
    samples: tuple[Sample, ...]
    max_length: int
    _cuts: dict[Cut, Batch] = field(default_factory=dict, repr=False, compare=False)

    def cut(self, cut: Cut) -> Batch:
        """The batch cut into microbatches; kept."""
        if cut not in self._cuts:
            self._cuts[cut] = _batch(self, cut)
        return self._cuts[cut]

    @functools.cached_property
    def model_flops(self) -> float:
        """Forward of the whole batch, nothing computed again, the lower half of attention."""
        return sum(
            self.sample_language_flops(sample, sample.num_tokens) + sum(self.sample_image_flops(sample))
            for sample in self.samples
        )

    @functools.cached_property
    def flops_by_grid(self) -> dict[Grid, float]:
        """Forward of an image by its patch grid."""
        grids = {grid for sample in self.samples for grid in sample.grids}
        return {grid: float(image_flops(self.architecture, grid)) for grid in grids}

    @functools.cached_property
    def image_totals(self) -> tuple[float, float]:
        """(forward FLOPs, patches) of all images."""
        flops = sum(sum(self.sample_image_flops(sample)) for sample in self.samples)
        patches = sum(math.prod(grid[:3]) for sample in self.samples for grid in sample.grids)
        return flops, float(patches)

    def num_visual_tokens(self, grids: Iterable[Grid]) -> int:
        """Of some images."""
        return sum(self.architecture.inputs.num_image_tokens(grid) for grid in grids)

    def sample_language_flops(self, sample: Sample, num_tokens: int) -> float:
        """Forward of the language model on a sample alone in its row, padded to so many tokens."""
        visual = self.num_visual_tokens(sample.grids)
        return float(language_flops(self.architecture, [num_tokens], visual, causal_half=True))

    def sample_image_flops(self, sample: Sample) -> tuple[float, ...]:
        """Forward of each image of a sample."""
        return tuple(self.flops_by_grid[grid] for grid in sample.grids)


def typical_batch(
    architecture: Architecture, samples: Sequence[Sample], global_batch_size: int, max_length: int
) -> Workload:
    """Draw a global batch at even steps from all samples.

    Raises:
        UseError: no sample is short enough.
    """
    usable = [sample for sample in samples if sample.num_tokens <= max_length]
    if not usable:
        longest = min((sample.num_tokens for sample in samples), default=0)
        raise use_error(
            "data.max_length",
            max_length,
            f"at least {longest}, the tokens of the shortest sample" if samples else "a data set with samples",
            "raise data.max_length, or max_pixels down",
        )
    picked = [usable[index * len(usable) // global_batch_size % len(usable)] for index in range(global_batch_size)]
    if len(usable) < global_batch_size:
        picked = [usable[index % len(usable)] for index in range(global_batch_size)]
    return Workload(architecture, tuple(picked), max_length)


def read_lengths(path: str | Path, inputs: InputSpec) -> list[Sample]:
    """Samples from a CSV file (also .gz).

    It has the column `num_tokens`, all tokens of a row, and one of two for images: `grids`, the patch grids as
    `1x28x28 1x14x20` (of tiles that are joined, `5x24x24x2x48x40`: see `config/inputs.py`), or `num_tiles`, the number
    of tiles of 448 x 448 pixels that count as 256 of the tokens each; these become as many tokens as the model makes
    of them.

    Raises:
        UseError: no such file, a missing column, a value that is no number, no row.
    """
    file = Path(path)
    if not file.is_file():
        raise use_error("--lengths", f"`{path}`, no such file", "a CSV file", "correct the path")
    opened = gzip.open(file, "rt", encoding="utf-8", newline="") if file.suffix == ".gz" else file.open(newline="")
    with opened as stream:
        reader = csv.DictReader(stream)
        columns = set(reader.fieldnames or ())
        if "num_tokens" not in columns or not columns & {"grids", "num_tiles"}:
            raise use_error(
                str(path),
                f"columns {', '.join(sorted(columns)) or 'none'}",
                "num_tokens, and grids or num_tiles",
                "add",
            )
        read = _with_grids if "grids" in columns else _with_tiles
        samples = []
        for number, row in enumerate(reader, 2):
            try:
                samples.append(read(row, inputs))
            except (ValueError, TypeError, AttributeError) as error:
                raise use_error(f"{path} line {number}", error, "whole numbers", "correct the line") from error
    if not samples:
        raise use_error(str(path), "no row", "a line for each sample", "write some")
    return samples


def _with_grids(row: dict[str, str], inputs: InputSpec) -> Sample:
    grids = []
    for text in row["grids"].split():
        grid = tuple(int(part) for part in text.split("x"))
        expected = 6 if inputs.image_kind == "anyres" else 3
        if len(grid) != expected:
            raise ValueError(f"grid {text}: {len(grid)} numbers, the model's have {expected}")
        grids.append(grid)
    return _sample(int(row["num_tokens"]), grids)


def _with_tiles(row: dict[str, str], inputs: InputSpec) -> Sample:
    """A tile as the model would take it: its own image size, or the multiple of its patches next to 448 pixels."""
    side_px = inputs.image_px or TILE_PX
    step = inputs.merge_size
    side = side_px // inputs.patch_px // step * step
    num_tiles = int(row["num_tiles"])
    text = int(row["num_tokens"]) - TILE_TOKENS * num_tiles
    grids = _joined_tiles(num_tiles, side, inputs) if inputs.image_kind == "anyres" else [(1, side, side)] * num_tiles
    return _sample(text + sum(map(inputs.num_image_tokens, grids)), grids)


def _joined_tiles(num_tiles: int, side: int, inputs: InputSpec) -> list[Grid]:
    """Images that so many tiles make up together, each with as many as it can have; the whole image is one of them."""
    shapes = [(height // inputs.image_px, width // inputs.image_px) for height, width in inputs.tile_sizes]
    grids: list[Grid] = []
    while num_tiles > 0:
        fitting = [shape for shape in shapes if math.prod(shape) < num_tiles]
        if fitting:
            rows, columns = max(fitting, key=lambda shape: (math.prod(shape), -abs(shape[0] - shape[1])))
            grids.append((1 + rows * columns, side, side, columns, rows * side, columns * side))
        else:
            grids.append((1, side, side, 0, 0, 0))
        num_tiles -= grids[-1][0]
    return grids


def _sample(num_tokens: int, grids: Iterable[Grid]) -> Sample:
    if num_tokens < 1:
        raise ValueError(f"{num_tokens} tokens")
    return Sample(num_tokens, tuple(grids))


def _batch(workload: Workload, cut: Cut) -> Batch:
    samples = workload.samples
    packs: list[list[Sequence[int]]]
    if cut.samples:
        rows = np.arange(len(samples)).reshape(-1, cut.samples)
        packs = [[row.tolist() for row in rows[data :: cut.data]] for data in range(cut.data)]
    else:
        packs = [list(rank) for rank in split(_costs(workload, cut), cut.data, multiple=cut.multiple)]
    made = tuple(tuple(_pack(workload, indices, cut.padding) for indices in rank) for rank in packs)
    layers = workload.architecture.language.num_layers
    work = [sum(pack.layer_flops * layers + pack.head_flops + sum(pack.image_flops) for pack in rank) for rank in made]
    rounds = range(len(made[0]))
    return Batch(
        packs=made,
        fullest=made[int(np.argmax(work))],
        round_image_flops_M=np.array([sum(sum(rank[m].image_flops) for rank in made) for m in rounds]),
        largest_image_flops=max((max(pack.image_flops, default=0.0) for rank in made for pack in rank), default=0.0),
        round_patches_M=np.array([sum(rank[m].num_patches for rank in made) for m in rounds]),
    )


def _costs(workload: Workload, cut: Cut) -> SampleCosts:
    tokens_N = np.array([_padded(sample.num_tokens, cut.padding) for sample in workload.samples])
    costs = [
        workload.sample_language_flops(sample, int(tokens))
        for sample, tokens in zip(workload.samples, tokens_N, strict=True)
    ]
    encoder = [sum(workload.sample_image_flops(sample)) for sample in workload.samples]
    return SampleCosts(tokens_N, np.array(encoder, dtype=float), np.array(costs, dtype=float), cut.packing_length)


def _padded(num_tokens: int, multiple: int) -> int:
    return -(-num_tokens // multiple) * multiple


def _pack(workload: Workload, indices: Sequence[int], padding: int) -> Pack:
    language = workload.architecture.language
    samples = [workload.samples[index] for index in indices]
    lengths = tuple(_padded(sample.num_tokens, padding) for sample in samples)
    grids = tuple(grid for sample in samples for grid in sample.grids)
    num_visual_tokens = workload.num_visual_tokens(grids)
    return Pack(
        lengths=lengths,
        grids=grids,
        image_flops=tuple(flops for sample in samples for flops in workload.sample_image_flops(sample)),
        layer_flops=layer_flops(workload.architecture, lengths, num_visual_tokens, causal_half=True),
        head_flops=float(head_flops(language, sum(lengths))),
        num_visual_tokens=num_visual_tokens,
        num_patches=sum(math.prod(grid[:3]) for grid in grids),
    )

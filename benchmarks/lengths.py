"""The samples that benches are run on: of real data sets, and synthetic ones with a long tail."""

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PACK_TOKENS = 8192
PATCHES_A_TILE = 1024
PATCHES_A_TOKEN = 4
FILL = 0.97
"""A global batch has as many samples as fill its packs to this part."""
LENGTHS = Path(__file__).parent / "data" / "vlm_lengths.csv.gz"


@dataclass(frozen=True)
class Sample:
    """One row: tokens in all, and the ViT patches of each image (or tile), within which attention stays."""

    num_tokens: int
    image_patches: tuple[int, ...]


def real_samples() -> list[Sample]:
    """All rows of AI2D, ChartQA and DocVQA in arrival order; see data/README.md."""
    with gzip.open(LENGTHS, "rt", encoding="utf-8", newline="") as file:
        return [
            Sample(min(int(row["num_tokens"]), PACK_TOKENS), (PATCHES_A_TILE,) * int(row["num_tiles"]))
            for row in csv.DictReader(file)
        ]


def long_tail_samples(num_samples: int = 20000, seed: int = 0) -> list[Sample]:
    """Made-up rows: images at their own resolution, text as long, both lognormal; some rows are text only.

    Images have 256 to 8,192 patches (median 1,600), text 16 tokens and more (median 250); one row in seven has no
    image, one in ten has two to four. Rows longer than a pack are left out.
    """
    generator = np.random.default_rng(seed)
    samples: list[Sample] = []
    while len(samples) < num_samples:
        kind = generator.random()
        num_images = 0 if kind < 1 / 7 else int(generator.integers(2, 5)) if kind > 0.9 else 1
        patches = np.exp(generator.normal(np.log(1600), 0.9, num_images)).clip(256, 8192).astype(int) // 4 * 4
        num_tokens = 16 + int(np.exp(generator.normal(np.log(250), 1.0))) + int(patches.sum()) // PATCHES_A_TOKEN
        if num_tokens <= PACK_TOKENS:
            samples.append(Sample(num_tokens, tuple(patches.tolist())))
    return samples


def draw(pool: list[Sample], num_packs: int, generator: np.random.Generator) -> list[Sample]:
    """A global batch: as many samples as fill the packs to 97%."""
    wanted = FILL * num_packs * PACK_TOKENS
    samples: list[Sample] = []
    tokens = 0
    while tokens < wanted:
        samples.append(pool[int(generator.integers(len(pool)))])
        tokens += samples[-1].num_tokens
    return samples


def in_arrival_order(samples: list[Sample], multiple: int) -> list[list[Sample]]:
    """Next fit: a pack is closed by the first sample that is too long for it. Empty packs make up for the multiple."""
    packs: list[list[Sample]] = [[]]
    used = 0
    for sample in samples:
        if used + sample.num_tokens > PACK_TOKENS:
            packs.append([])
            used = 0
        packs[-1].append(sample)
        used += sample.num_tokens
    return packs + [[] for _ in range(-len(packs) % multiple)]

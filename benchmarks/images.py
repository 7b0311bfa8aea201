# ruff: noqa: T201 (a program: it prints)
"""Images a second through the loader, against decoding and resizing alone with the same library on the same cores.

    python -m benchmarks.images [--images 256]

Photographs (JPEG, 640 x 427) become patches of a Qwen-VL of about 252 x 168 pixels. The loader reads rows and the index
that was made of them, decodes, resizes, patchifies and packs, in this process or in workers; what it delivers, and what
workers hand over, are patches of bytes. That is the required figure. Stated beside it is what is left when this process
normalises them as well, which is no part of loading: a rank without a GPU does it before its encoder runs; with a GPU,
the GPU does. The yardstick only decodes and resizes, in as many processes, DALI's as many images in one call as the
loader's does. They take turns; the best round of each counts. Exit code 1 when a required figure is missed.
"""

import argparse
import functools
import json
import multiprocessing
import multiprocessing.pool
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from megavlm.config.inputs import InputSpec
from megavlm.data.dataset import Dataset
from megavlm.data.encode import open_encoder
from megavlm.data.image_loading import ImageLoading
from megavlm.data.image_patches import normalised
from megavlm.data.index_files import build_index
from megavlm.data.loader import BatchLoader
from megavlm.data.rows import Rows
from megavlm.data.sample import MicrobatchOrder
from megavlm.platform.capabilities import probe
from tests.evidence import record, row
from tests.pictures import encoded, photo
from tests.tiny import VOCAB_SIZE, write_tiny_qwen3vl

LEAST_RATIO, AIM = 0.85, 0.95
NUM_ROUNDS = 3
NUM_FILES = 32
ROWS_A_MICROBATCH = 8
PREFETCH = 2
"""Microbatches that each worker prepares ahead."""
SIZE = (256, 160)
"""(width, height) in pixels of what the model sees."""

Backend = Literal["pil", "dali"]
INPUTS = InputSpec(5, VOCAB_SIZE, "dynamic", 16, 2, 2, 0, "mrope")


@dataclass(frozen=True)
class Rates:
    """Images a second.

    Attributes:
        loader: through the loader, which delivers bytes.
        with_values: through the loader, and normalised on this process's CPU.
        bare: decoded and resized, nothing else.
    """

    loader: float
    with_values: float
    bare: float


def write_rows(root: Path, num_images: int) -> Path:
    """Rows of one photograph each; the same few files again and again, so that the disk plays no part."""
    for number in range(NUM_FILES):
        (root / f"{number}.jpg").write_bytes(encoded(photo(number, 640, 427), "JPEG", quality=90))
    turns = [{"role": "user", "content": "<image>what is it?"}, {"role": "assistant", "content": "a red square"}]
    rows = [{"messages": turns, "images": [f"{number % NUM_FILES}.jpg"]} for number in range(num_images)]
    (root / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return root / "rows.jsonl"


def bare_pil(paths: Sequence[Path]) -> int:
    """Decode and resize with PIL, nothing else."""
    num_rows = 0
    for path in paths:
        with Image.open(path) as image:
            num_rows += len(np.asarray(image.convert("RGB").resize(SIZE, resample=3)))
    return num_rows


def bare_dali(paths: Sequence[Path]) -> int:
    """Decode and resize with DALI, nothing else."""
    import nvidia.dali.experimental.dynamic as dynamic
    from nvidia.dali import types

    with dynamic.EvalMode.sync_cpu:
        pixels = dynamic.decoders.image(dynamic.as_batch([np.fromfile(path, np.uint8) for path in paths]))
        pixels = dynamic.resize(pixels, size=SIZE[::-1], interp_type=types.INTERP_CUBIC, antialias=True)
        return sum(len(np.asarray(one.cpu())) for one in pixels.tensors)


BARE: dict[Backend, Callable[[Sequence[Path]], int]] = {"pil": bare_pil, "dali": bare_dali}


def in_one_process(
    backend: Backend, dataset: Dataset, microbatches: Sequence[MicrobatchOrder], paths: Sequence[Path]
) -> Rates:
    """Microbatch by microbatch in turn, so that all see the same machine."""
    loader = BatchLoader(dataset, lambda step: [microbatches[step]], 1, 1)
    begin_bare(backend, paths[0])
    loader_s = values_s = bare_s = 0.0
    for step in range(len(microbatches)):
        started_s = time.perf_counter()
        BARE[backend](paths[step * ROWS_A_MICROBATCH : (step + 1) * ROWS_A_MICROBATCH])
        bare_s += time.perf_counter() - started_s
        started_s = time.perf_counter()
        (microbatch,) = loader.batches(step)
        between_s = time.perf_counter()
        normalised(microbatch.pixels)
        loader_s += between_s - started_s
        values_s += time.perf_counter() - between_s
    return Rates(len(paths) / loader_s, len(paths) / (loader_s + values_s), len(paths) / bare_s)


def in_workers(
    backend: Backend,
    dataset: Dataset,
    microbatches: Sequence[MicrobatchOrder],
    paths: Sequence[Path],
    num_workers: int,
) -> Rates:
    """Of as many processes each, which take turns: while one side is measured, the other waits."""
    start = functools.partial(begin_bare, backend, paths[0])
    loader = BatchLoader(dataset, lambda _step: microbatches, 1, 1, num_workers, PREFETCH)
    with multiprocessing.get_context("spawn").Pool(num_workers, start) as pool:
        pool.map(BARE[backend], [paths[:4]] * num_workers, chunksize=1)
        loader_rate(loader, 0, num_workers, normalise=False)  # in which workers start
        bare = [_pool_rate(pool, backend, paths)]
        delivered = loader_rate(loader, 1, num_workers, normalise=False)
        bare.append(_pool_rate(pool, backend, paths))
        with_values = loader_rate(loader, 2, num_workers, normalise=True)
        bare.append(_pool_rate(pool, backend, paths))
    loader.close()
    return Rates(delivered, with_values, max(bare))


def _pool_rate(pool: multiprocessing.pool.Pool, backend: Backend, paths: Sequence[Path]) -> float:
    microbatches = [paths[start : start + ROWS_A_MICROBATCH] for start in range(0, len(paths), ROWS_A_MICROBATCH)]
    time.sleep(1.0)  # the loader's workers fill their queues
    started_s = time.perf_counter()
    pool.map(BARE[backend], microbatches, chunksize=1)
    return len(paths) / (time.perf_counter() - started_s)


def begin_bare(backend: Backend, path: Path) -> None:
    """What a process does before its images are counted."""
    if backend == "dali":
        import nvidia.dali.experimental.dynamic as dynamic

        dynamic.set_num_threads(1)
    BARE[backend]([path])


def loader_rate(loader: BatchLoader, step: int, num_workers: int, *, normalise: bool) -> float:
    """Images a second of a step, from when what was prepared ahead has been taken: workers go on to the next step."""
    num_images, started_s = 0, 0.0
    for number, microbatch in enumerate(loader.batches(step)):
        if normalise:
            normalised(microbatch.pixels)
        if number >= PREFETCH * num_workers:
            num_images += len(microbatch.batch.sample_ids)
        else:
            started_s = time.perf_counter()
    return num_images / (time.perf_counter() - started_s)


def measure(backend: Backend, hf_dir: Path, rows: Path, num_workers: int) -> Rates:
    """Each of its best round."""
    loading = ImageLoading(backend=backend)
    encoder = open_encoder(hf_dir, INPUTS, 512, max_pixels=SIZE[0] * SIZE[1] + 4000, loading=loading)
    dataset = Dataset(Rows.open([str(rows)]), encoder)
    dataset.adopt(build_index(rows.parent / "index", dataset.samples, encoder))
    assert dataset.grids_each[0] == ((1, SIZE[1] // 16, SIZE[0] // 16),), dataset.grids_each[0]
    microbatches = [
        MicrobatchOrder(tuple(indices), tuple((index, 0) for index in indices))
        for indices in np.arange(len(dataset)).reshape(-1, ROWS_A_MICROBATCH).tolist()
    ]
    paths = [rows.parent / f"{number % NUM_FILES}.jpg" for number in range(len(dataset))]
    rounds = [
        in_workers(backend, dataset, microbatches, paths, num_workers)
        if num_workers
        else in_one_process(backend, dataset, microbatches, paths)
        for _ in range(NUM_ROUNDS)
    ]
    return Rates(*(max(vars(rates)[name] for rates in rounds) for name in ("loader", "with_values", "bare")))


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; 1 if one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="a round, a multiple of 8 (default: 256)")
    options = parser.parse_args(arguments)
    backends: list[Backend] = ["pil", "dali"] if probe("nvidia-dali").available else ["pil"]
    num_workers = max(1, min(2, os.cpu_count() or 1))
    reached = True
    with tempfile.TemporaryDirectory() as folder:
        hf_dir = write_tiny_qwen3vl(Path(folder) / "model")
        rows = write_rows(Path(folder), options.images)
        for backend in backends:
            for workers in (0, num_workers):
                rates = measure(backend, hf_dir, rows, workers)
                where = f"{workers} workers" if workers else "one process"
                reached &= rates.loader / rates.bare >= LEAST_RATIO
                for what, name, rate, required in (
                    ("images", "patches of bytes delivered", rates.loader, f">= {LEAST_RATIO} (aim {AIM})"),
                    ("normalised images", "patches also normalised on the rank's CPU", rates.with_values, None),
                ):
                    found = f"{rate:.0f} images/s, bare {rates.bare:.0f}, ratio {rate / rates.bare:.2f}"
                    print(f"{backend}, {where}, {name}: {found}")
                    _write_down(f"Loader, {what} by {backend}, {where}", name, rate, rates.bare, required)
    print(f"{'reached' if reached else 'MISSED'}: at least {LEAST_RATIO} of bare decoding and resizing, aim {AIM}")
    return 0 if reached else 1


def _write_down(title: str, name: str, rate: float, bare: float, required: str | None) -> None:
    record(
        "data",
        [
            row(
                f"{title}: images/s",
                rate,
                unit=f"images/s, JPEG of 640 x 427 to 256 x 160, {name}",
                reference="decoding and resizing alone, images/s",
                reference_value=bare,
                command="make bench-data",
            ),
            row(
                f"{title}: share",
                rate / bare,
                unit=f"{name}, of decoding and resizing alone, same library and cores",
                required=required,
                command="make bench-data",
            ),
        ],
    )


if __name__ == "__main__":
    sys.exit(main())

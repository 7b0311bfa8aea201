"""From orders to the microbatches of one rank, in this process or in worker processes: the same either way.

Shape suffix: B bytes.
"""

import atexit
import collections
import itertools
import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.utils.data

from megavlm.data.augment import Draw, draw_for
from megavlm.data.dataset import Dataset, PrepareReport
from megavlm.data.matching import content_digests
from megavlm.data.packing import pack
from megavlm.data.pixels import WantedImage, load_pixels
from megavlm.data.sample import Microbatch, MicrobatchOrder
from megavlm.errors import RunError, UseError

logger = logging.getLogger(__name__)

LEAST_SHARED_BYTES = 128 * 1024
"""Pixels of a microbatch that take less leave a worker through its pipe. A file of shared memory takes both processes
together most of a millisecond, whatever its size; so many bytes through the pipe, a quarter of that."""

__all__ = ["BatchLoader", "Dataset", "PrepareReport", "evaluation_rows"]


@dataclass(frozen=True)
class _Failure:
    """A UseError on its way out of a worker: torch would wrap the exception in a traceback of the worker."""

    message: str


class _WorkerDied(RunError):
    """A worker process ended by itself, or was ended by somebody else."""


class _MicrobatchBuilder(torch.utils.data.Dataset):
    """Builds microbatches on request; this is what is sent to worker processes."""

    def __init__(self, dataset: Dataset, sample_multiple: int, total_multiple: int) -> None:
        self.dataset = dataset
        self.sample_multiple = sample_multiple
        self.total_multiple = total_multiple

    def build(self, order: MicrobatchOrder) -> Microbatch:
        encoder = self.dataset.encoder
        # Each row once, however many images it has: not every row has room in the dataset's cache.
        rows = {index: self.dataset.encoded(index) for index in (*order.indices, *dict(order.images))}
        batch = pack(
            [rows[index] for index in order.indices],
            None,
            sample_multiple=self.sample_multiple,
            total_multiple=self.total_multiple,
            pad_token_id=encoder.tokenizer.pad_token_id,
            patch_channels=encoder.inputs.patch_channels,
            token_weights=order.token_weights,
        )
        if self.dataset.references is not None:
            batch.references_NQ = torch.from_numpy(self.dataset.references[list(order.indices)])
        batch.tasks_N = self.dataset.tasks_of(order.indices)
        if encoder.row_kind == "image_text":
            contents = [(index, *content_digests(rows[index])) for index in order.indices]
            batch.contents_N3 = torch.tensor(contents, dtype=torch.int64)
        if order.step >= 0:
            batch.noise_seeds_N = torch.tensor([order.step << 40 | index for index in order.indices])
        if order.filler:
            batch.loss_weights_T.zero_()
            batch.real_T.zero_()
        left_to_pil: list[str] = []
        wanted = [
            WantedImage(rows[index], number, self._draw(index, number, order.step)) for index, number in order.images
        ]
        pixels = load_pixels(wanted, encoder, left_to_pil=left_to_pil, empty=_shared_empty)
        return Microbatch(batch, pixels, tuple(left_to_pil))

    def _draw(self, index: int, number: int, step: int) -> Draw | None:
        augmentation = self.dataset.encoder.loading.augmentation
        if step < 0 or augmentation is None:
            return None
        return draw_for(augmentation, self.dataset.sample(index), step, index, number)

    def __getitem__(self, order: MicrobatchOrder) -> Microbatch | _Failure:
        try:
            return self.build(order)
        except UseError as error:
            return _Failure(str(error))


def _shared_empty(num_bytes: int) -> torch.Tensor:
    """Uint8 [num_bytes]; many, in a worker, in memory that the rank sees too, so that they are not copied once more."""
    values_B = torch.empty(num_bytes, dtype=torch.uint8)
    is_shared = num_bytes >= LEAST_SHARED_BYTES and torch.utils.data.get_worker_info() is not None
    # Before anything is written: sharing it later, as torch does with what a worker returns, would copy the pixels.
    return values_B.share_memory_() if is_shared else values_B


class BatchLoader:
    """The microbatches of one rank; the same for any number of workers."""

    def __init__(
        self,
        dataset: Dataset,
        orders_of: Callable[[int], Sequence[MicrobatchOrder]],
        sample_multiple: int,
        total_multiple: int,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            dataset: prepared training rows.
            orders_of: step (from 0) to what this rank wants of its microbatches, in order; at least one a step.
            sample_multiple: see `packing.pack`.
            total_multiple: see `packing.pack`.
            num_workers: processes that prepare microbatches ahead; 0: prepared in this process when asked for.
            prefetch_factor: microbatches that each of them prepares ahead.
            pin_memory: whether what workers prepare is put into page-locked memory, for a GPU.
        """
        self._dataset = dataset
        self._orders_of = orders_of
        self._build = (sample_multiple, total_multiple)
        self._num_workers = num_workers
        self._prefetch_factor = prefetch_factor
        self._pin_memory = pin_memory
        self.left_to_pil: collections.Counter[str] = collections.Counter()
        """Images that DALI was to decode and PIL has decoded, by kind."""
        self._stream: Iterator[Microbatch] | None = None
        self._stream_next = (-1, -1)
        self._eval_loaders: dict[tuple[int, tuple[MicrobatchOrder, ...]], torch.utils.data.DataLoader] = {}

    def batches(self, step: int) -> Iterator[Microbatch]:
        """The microbatches of this rank in a step; workers go on ahead to the steps that follow.

        Workers that die (of memory, of a signal) are replaced, and the microbatch is prepared again.

        Raises:
            UseError: naming the row whose image cannot be read.
            RunError: the new workers died at the same microbatch; its samples are named.
        """
        orders = self._orders_of(step)
        if self._num_workers == 0:
            yield from self._counted(self._in_this_process(self._dataset, orders))
            return
        for number in range(len(orders)):
            batch = self._next_of_anybody(step, number, orders[number])
            done = number + 1 == len(orders)
            self._stream_next = (step + 1, 0) if done else (step, number + 1)
            yield batch

    def _next_of_anybody(self, step: int, number: int, order: MicrobatchOrder) -> Microbatch:
        """The next microbatch, of new workers if one has died."""
        try:
            return self._next(step, number)
        except _WorkerDied as death:
            logger.warning("%s; new ones take over", death)
        # Not above: the handler's traceback would keep the others of the old workers alive.
        try:
            return self._next(step, number)
        except _WorkerDied as death:
            ids = dict.fromkeys(self._dataset.sample_id(index) for index in (*order.indices, *dict(order.images)))
            raise RunError(f"{death}, again; step {step + 1}, at the latest sample(s) {', '.join(ids)}") from death

    def _next(self, step: int, number: int) -> Microbatch:
        if self._stream is None or self._stream_next != (step, number):
            self._start_stream(step, number)
        assert self._stream is not None
        # Not known until the batch is out: a generator that is dropped halfway must not be gone on from.
        self._stream_next = (-1, -1)
        return next(self._stream)

    def eval_batches(self, held_out: Dataset, orders: Sequence[MicrobatchOrder]) -> Iterator[Microbatch]:
        """Microbatches of held-out rows (see `evaluation_rows`); their workers stay for the next evaluation.

        Args:
            held_out: prepared rows.
            orders: what this rank wants of them, the same at every evaluation.

        Raises:
            UseError: as in `batches`.
            RunError: as in `batches`.
        """
        if self._num_workers == 0:
            return self._counted(self._in_this_process(held_out, orders))
        key = (id(held_out), tuple(orders))
        if key not in self._eval_loaders:
            self._eval_loaders[key] = self._loader(held_out, orders, keep_workers=True)
        return self._counted(_checked(iter(self._eval_loaders[key])))

    def close(self) -> None:
        """End the worker processes; the loader can be used again after."""
        self._stream = None
        self._stream_next = (-1, -1)
        self._eval_loaders.clear()

    def _counted(self, stream: Iterator[Microbatch]) -> Iterator[Microbatch]:
        """Count what DALI leaves to PIL, and say it once for each kind."""
        for microbatch in stream:
            for kind in microbatch.left_to_pil:
                if kind not in self.left_to_pil:
                    logger.warning("data.image_backend=dali: images of the kind %s are decoded by PIL", kind)
                self.left_to_pil[kind] += 1
            yield microbatch

    def _in_this_process(self, dataset: Dataset, orders: Iterable[MicrobatchOrder]) -> Iterator[Microbatch]:
        builder = _MicrobatchBuilder(dataset, *self._build)
        for order in orders:
            yield builder.build(order)

    def _start_stream(self, step: int, number: int) -> None:
        self._stream = None  # ends the workers of the stream before
        steps = (self._orders_of(later) for later in itertools.count(step))
        upcoming = itertools.islice(itertools.chain.from_iterable(steps), number, None)
        self._stream = self._counted(_checked(iter(self._loader(self._dataset, upcoming, keep_workers=False))))

    def _loader(
        self, dataset: Dataset, orders: Iterable[MicrobatchOrder], *, keep_workers: bool
    ) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(
            _MicrobatchBuilder(dataset, *self._build),
            batch_size=None,
            sampler=orders,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch_factor,
            pin_memory=self._pin_memory,
            collate_fn=_unchanged,  # type: ignore[arg-type]
            worker_init_fn=_begin_worker if self._num_workers else None,
            # Not fork: this process has threads (of the collectives, of the CUDA runtime).
            multiprocessing_context="spawn",
            persistent_workers=keep_workers,
        )


def _begin_worker(_worker: int) -> None:
    # Schedulers and terminals signal every process of a job; the rank needs its workers until it has saved.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # A worker that is ended while its queue's thread sends a batch would abort ("terminate called"): the interpreter,
    # on its way down, stops that thread inside torch's C++. There is nothing left to take down; this comes before.
    atexit.register(os._exit, 0)


def _unchanged(batch: Microbatch | _Failure) -> Microbatch | _Failure:
    return batch


def _checked(stream: Iterator[Microbatch | _Failure]) -> Iterator[Microbatch]:
    """Turn what went wrong in a worker into the project's two kinds of error."""
    while True:
        try:
            item = next(stream)
        except StopIteration:
            return
        except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
            if not _is_death(error):
                raise
            # Ends the others now: the traceback of the error would keep them alive.
            del stream
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise _WorkerDied(f"a data loader worker died ({reason}; is there enough memory?)") from error
        if isinstance(item, _Failure):
            # Ends the workers now: the traceback of the error would keep them alive.
            del stream
            raise UseError(item.message)
        yield item


def _is_death(error: Exception) -> bool:
    """Whether torch's DataLoader raised this because a worker is gone."""
    if isinstance(error, RuntimeError):
        return str(error).startswith(("DataLoader worker (pid", "Pin memory thread exited"))
    # Memory with pixels is fetched from the worker that made it: of one that has died since, there is nobody to answer.
    # What the worker's own code raised has a traceback of the worker in it.
    return " in DataLoader worker process " not in str(error)


def evaluation_rows(
    held_out: Dataset, micro_batch_size: int, dp_size: int, *, max_rounds: int = 0
) -> list[list[tuple[tuple[int, ...], bool]]]:
    """A walk over held-out rows, once, in order: per data rank its microbatches as (sample indices, filler).

    Microbatches are dealt to the data ranks in turn. Every rank gets as many: one that runs short gets a filler, whose
    weights are all 0.

    Args:
        held_out: prepared rows.
        micro_batch_size: samples of a microbatch.
        dp_size: data ranks.
        max_rounds: at most so many microbatches a rank; 0: all rows.
    """
    size = micro_batch_size
    everyones = [tuple(range(start, min(start + size, len(held_out)))) for start in range(0, len(held_out), size)]
    num_rounds = -(-len(everyones) // dp_size)
    num_rounds = min(num_rounds, max_rounds) if max_rounds else num_rounds
    shortest = int(held_out.num_tokens_each.argmin())
    dealt = []
    for data in range(dp_size):
        rows = [(indices, False) for indices in everyones[data::dp_size][:num_rounds]]
        dealt.append(rows + [((shortest,), True)] * (num_rounds - len(rows)))
    return dealt

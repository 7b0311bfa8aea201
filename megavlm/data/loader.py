"""From rows to the microbatches of one data rank, in this process or in worker processes: the same either way."""

import itertools
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch.utils.data

from megavlm.data.dataset import Dataset, PrepareReport, load_sample_patches
from megavlm.data.packing import pack
from megavlm.data.plan import GlobalBatchPlan
from megavlm.data.sample import Batch
from megavlm.errors import RunError, UseError

__all__ = ["BatchLoader", "Dataset", "PrepareReport"]


@dataclass(frozen=True)
class _Microbatch:
    """What to build: sample indices; a filler has weights 0."""

    indices: tuple[int, ...]
    filler: bool = False


@dataclass(frozen=True)
class _Failure:
    """A UseError on its way out of a worker: torch would wrap the exception in a traceback of the worker."""

    message: str


class _MicrobatchBuilder(torch.utils.data.Dataset):
    """Builds microbatches on request; this is what is sent to worker processes."""

    def __init__(self, dataset: Dataset, sample_multiple: int, total_multiple: int, load_pixels: bool) -> None:
        self.dataset = dataset
        self.sample_multiple = sample_multiple
        self.total_multiple = total_multiple
        self.load_pixels = load_pixels

    def build(self, microbatch: _Microbatch) -> Batch:
        encoder = self.dataset.encoder
        samples = [self.dataset.encoded(index) for index in microbatch.indices]
        patches = None
        if self.load_pixels:
            patches = [image for sample in samples for image in load_sample_patches(sample, encoder)]
        batch = pack(
            samples,
            patches,
            sample_multiple=self.sample_multiple,
            total_multiple=self.total_multiple,
            pad_token_id=encoder.tokenizer.pad_token_id,
            patch_channels=encoder.inputs.patch_channels,
        )
        if microbatch.filler:
            batch.loss_weights_T.zero_()
        return batch

    def __getitem__(self, microbatch: _Microbatch) -> Batch | _Failure:
        try:
            return self.build(microbatch)
        except UseError as error:
            return _Failure(str(error))


class BatchLoader:
    """The microbatches of one data rank; the same for any number of workers."""

    def __init__(
        self,
        dataset: Dataset,
        plan: GlobalBatchPlan,
        dp_rank: int,
        dp_size: int,
        sample_multiple: int,
        total_multiple: int,
        num_workers: int = 0,
        load_pixels: bool = True,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            dataset: prepared training rows.
            plan: made for `len(dataset)` and `dp_size`.
            dp_rank: this data rank.
            dp_size: data ranks in all.
            sample_multiple: see `packing.pack`.
            total_multiple: see `packing.pack`.
            num_workers: processes that prepare microbatches ahead; 0: prepared in this process when asked for.
            load_pixels: False where no image is encoded (later pipeline stages): rows then have no patches.
        """
        assert plan.num_samples == len(dataset) and plan.dp_size == dp_size and 0 <= dp_rank < dp_size
        self._dataset = dataset
        self._plan = plan
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._build = (sample_multiple, total_multiple, load_pixels)
        self._num_workers = num_workers
        self._stream: Iterator[Batch] | None = None
        self._stream_next = (-1, -1)
        self._eval_loaders: dict[tuple[int, tuple[_Microbatch, ...]], torch.utils.data.DataLoader] = {}

    def batches(self, step: int) -> Iterator[Batch]:
        """The microbatches of this rank in a step; workers go on ahead to the steps that follow.

        Raises:
            UseError: naming the row whose image cannot be read.
            RunError: a worker process died.
        """
        if self._num_workers == 0:
            yield from self._in_this_process(self._dataset, self._of_step(step))
            return
        for number in range(self._plan.num_microbatches):
            if self._stream is None or self._stream_next != (step, number):
                self._start_stream(step, number)
            assert self._stream is not None
            # Not known until the batch is out: a generator that is dropped halfway must not be gone on from.
            self._stream_next = (-1, -1)
            batch = next(self._stream)
            done = number + 1 == self._plan.num_microbatches
            self._stream_next = (step + 1, 0) if done else (step, number + 1)
            yield batch

    def eval_batches(self, held_out: Dataset, *, max_rounds: int = 0, rounds_multiple: int = 1) -> Iterator[Batch]:
        """The part of this rank in a walk over held-out rows, once, in order.

        Microbatches are dealt to the data ranks in turn. Every rank gets as many: one that runs short gets fillers,
        whose weights are all 0.

        Args:
            held_out: prepared rows.
            max_rounds: at most so many microbatches a rank; 0: all rows.
            rounds_multiple: the number of microbatches is filled up to a multiple of this (interleaved pipelines).

        Raises:
            UseError: as in `batches`.
            RunError: as in `batches`.
        """
        microbatches = self._eval_microbatches(held_out, max_rounds, rounds_multiple)
        if self._num_workers == 0:
            return self._in_this_process(held_out, microbatches)
        key = (id(held_out), tuple(microbatches))
        if key not in self._eval_loaders:
            self._eval_loaders[key] = self._loader(held_out, microbatches, keep_workers=True)
        return _checked(iter(self._eval_loaders[key]))

    def close(self) -> None:
        """End the worker processes; the loader can be used again after."""
        self._stream = None
        self._stream_next = (-1, -1)
        self._eval_loaders.clear()

    def _of_step(self, step: int) -> list[_Microbatch]:
        return [_Microbatch(indices) for indices in self._plan.microbatches(step, self._dp_rank)]

    def _eval_microbatches(self, held_out: Dataset, max_rounds: int, rounds_multiple: int) -> list[_Microbatch]:
        size = self._plan.micro_batch_size
        everyones = [tuple(range(start, min(start + size, len(held_out)))) for start in range(0, len(held_out), size)]
        num_rounds = -(-len(everyones) // self._dp_size)
        num_rounds = min(num_rounds, max_rounds) if max_rounds else num_rounds
        mine = [_Microbatch(indices) for indices in everyones[self._dp_rank :: self._dp_size][:num_rounds]]
        num_wanted = -(-num_rounds // rounds_multiple) * rounds_multiple
        shortest = int(held_out.num_tokens_each.argmin())
        return mine + [_Microbatch((shortest,), filler=True)] * (num_wanted - len(mine))

    def _in_this_process(self, dataset: Dataset, microbatches: Iterable[_Microbatch]) -> Iterator[Batch]:
        builder = _MicrobatchBuilder(dataset, *self._build)
        for microbatch in microbatches:
            yield builder.build(microbatch)

    def _start_stream(self, step: int, number: int) -> None:
        self._stream = None  # ends the workers of the stream before
        steps = (self._of_step(later) for later in itertools.count(step))
        upcoming = itertools.islice(itertools.chain.from_iterable(steps), number, None)
        self._stream = _checked(iter(self._loader(self._dataset, upcoming, keep_workers=False)))

    def _loader(
        self, dataset: Dataset, microbatches: Iterable[_Microbatch], *, keep_workers: bool
    ) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(
            _MicrobatchBuilder(dataset, *self._build),
            batch_size=None,
            sampler=microbatches,
            num_workers=self._num_workers,
            collate_fn=_unchanged,  # type: ignore[arg-type]
            worker_init_fn=_leave_signals_to_the_rank if self._num_workers else None,
            # Not fork: this process has threads (of the collectives, of the CUDA runtime).
            multiprocessing_context="spawn",
            persistent_workers=keep_workers,
        )


def _leave_signals_to_the_rank(_worker: int) -> None:
    """Schedulers and terminals signal every process of a job; the rank needs its workers until it has saved."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _unchanged(batch: Batch | _Failure) -> Batch | _Failure:
    return batch


def _checked(stream: Iterator[Batch | _Failure]) -> Iterator[Batch]:
    """Turn what went wrong in a worker into the project's two kinds of error."""
    while True:
        try:
            item = next(stream)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise RunError(
                f"a data loader worker died ({str(error).splitlines()[0]}); is there enough memory?"
            ) from error
        if isinstance(item, _Failure):
            # Ends the workers now: the traceback of the error would keep them alive.
            del stream
            raise UseError(item.message)
        yield item

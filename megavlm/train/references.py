"""What the model says of the rows' answers before training: the reference of DPO, computed once and kept.

No second model is held: the log-probabilities of every sequence of every row are written to the run folder, and travel
with the rows from then on.

Shape suffixes: N rows, Q sequences of a row.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megavlm.checkpoint.hf_io import weight_files
from megavlm.config.numerics import row_multiples
from megavlm.data.dataset import Dataset
from megavlm.data.loader import BatchLoader, evaluation_rows
from megavlm.data.pairs import PAIR_PARTS
from megavlm.data.sample import Batch
from megavlm.errors import RunError
from megavlm.train.inputs import step_inputs
from megavlm.train.pipeline_work import Rows
from megavlm.train.scheduling import evaluation_schedule
from megavlm.train.stages.preference import answer_logprobs
from megavlm.train.stages.registry import STAGES
from megavlm.train.state import TrainState, is_main_rank, run_path
from megavlm.train.step import run_schedule

logger = logging.getLogger(__name__)

FOLDER = "reference"


def prepare_references(state: TrainState) -> None:
    """Give training and held-out rows what the model says of them as it is now, if the stage needs it.

    Called before a checkpoint is loaded; what an earlier attempt of the run has written is used.

    Raises:
        RunError: a log-probability is not finite.
    """
    if not STAGES[state.recipe.train.stage].needs_reference:
        return
    for rows in (state.train_set, state.eval_set):
        if rows is not None:
            rows.references = _references(state, rows)


def _references(state: TrainState, rows: Dataset) -> np.ndarray:
    path = run_path(state.recipe) / FOLDER / f"{_digest(state, rows)}.npy"
    found = [np.load(path) if is_main_rank() and path.is_file() else None]
    dist.broadcast_object_list(found)
    if found[0] is not None:
        logger.info("reference: %s", path)
        return found[0]
    logger.info("reference: what the model says of %d rows before training", len(rows))
    references_NQ = reference_logprobs(state, rows)
    if is_main_rank():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp.npy")
        np.save(unfinished, references_NQ)
        unfinished.rename(path)
    return references_NQ


def _digest(state: TrainState, rows: Dataset) -> str:
    """Name of the file: another model, other rows or other weights of tokens need another."""
    directory = state.directory.path
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(directory)]
    facts = (str(Path(directory).absolute()), files, rows.index.digest, rows.encoder.fingerprint,
             state.recipe.train.precision)  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@torch.no_grad()
def reference_logprobs(state: TrainState, rows: Dataset) -> np.ndarray:
    """Log-probability of every sequence of every row under the model as it stands, float32 [N, Q]; on every rank.

    Raises:
        RunError: one is not finite.
    """
    topology = state.groups.topology
    weights = state.token_schedule.last
    found_NQ = torch.zeros(len(rows), PAIR_PARTS, dtype=torch.float32, device=state.device)
    state.set_training(False)
    loader = BatchLoader(rows, lambda _step: (), *row_multiples(state.recipe))
    for rows_D in _rounds(state, rows):
        inputs = step_inputs(topology, state.parts.rank, rows, rows_D, state.costs, weights)
        loaded = list(loader.eval_batches(rows, inputs.orders))
        some = Rows([one.batch for one in loaded], [one.patches_PC for one in loaded], inputs.shares)

        def on_output(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Any]:
            sums_Q = answer_logprobs(logits, batch, state.groups)
            return sums_Q.sum(), torch.ones((), dtype=torch.int), sums_Q

        results, _ = run_schedule(state, evaluation_schedule(state.layout, len(loaded)), some, on_output)
        if state.groups.speaks and state.groups.context.rank() == 0:
            for order, sums_Q in zip(inputs.orders, results, strict=True):
                if not order.filler:
                    found_NQ[list(order.indices)] = sums_Q.view(-1, PAIR_PARTS)
    state.set_training(True)
    dist.all_reduce(found_NQ)
    broken = torch.nonzero(~found_NQ.isfinite().all(1))[:, 0].tolist()
    if broken:
        raise RunError(f"reference: no finite log-probability of the answers of {rows.sample_id(broken[0])}")
    return found_NQ.cpu().numpy()


def _rounds(state: TrainState, rows: Dataset) -> Iterator[list[list[tuple[tuple[int, ...], bool]]]]:
    """All rows once, in parts that fill the pipeline some times over: pixels of a part are held in memory at once."""
    topology = state.groups.topology
    rows_D = evaluation_rows(rows, state.recipe.train.micro_batch_size, topology.data)
    size = 4 * topology.pipeline
    for start in itertools.count(0, size):
        part = [rows_of_rank[start : start + size] for rows_of_rank in rows_D]
        if not part[0]:
            return
        yield part

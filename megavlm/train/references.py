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

from megavlm.checkpoint import native
from megavlm.config.numerics import row_multiples
from megavlm.config.schema import Recipe
from megavlm.data.dataset import Dataset
from megavlm.data.loader import BatchLoader, evaluation_rows
from megavlm.data.pairs import PAIR_PARTS
from megavlm.data.sample import Batch
from megavlm.errors import RunError, use_error
from megavlm.train.inputs import step_inputs
from megavlm.train.passes import run_schedule
from megavlm.train.pipeline_work import Rows
from megavlm.train.scheduling import evaluation_schedule
from megavlm.train.stages.preference import answer_logprobs
from megavlm.train.stages.registry import STAGES
from megavlm.train.starting_point import checkpoint_to_load, imported_weights, load_imported, starting_point
from megavlm.train.state import TrainState, is_main_rank, run_path

logger = logging.getLogger(__name__)

FOLDER = "reference"


def keeps_references(recipe: Recipe) -> bool:
    """Whether the rows of a run carry what a reference says of them."""
    return STAGES[recipe.train.stage].needs_reference and recipe.preference.reference == "cached"


def prepare_references(state: TrainState) -> None:
    """Give training and held-out rows what the model says of them before training, if the stage needs it.

    Called before a checkpoint is loaded; what an earlier attempt of the run has written is used. Imported weights that
    a run starts from are loaded here, when something is computed.

    Raises:
        RunError: a log-probability is not finite.
        UseError: it would have to be computed again, and the weights that the run started from are not there.
    """
    if not keeps_references(state.recipe):
        return
    here = starting_point(state)
    known, folder = _known_starting_point(state)
    state.starting_point = known or here
    rows_each = [rows for rows in (state.train_set, state.eval_set) if rows is not None]
    missing = [rows for rows in rows_each if not _take_written(state, rows)]
    if not missing:
        return
    if state.starting_point != here:
        raise use_error(
            str(_path(state, missing[0])),
            "no such file, and another model to compute it with (model.hf_dir, checkpoint.load_dir or peft)",
            f"the model that the run of {folder} started from, whose reference it goes on with",
            "keep what the run started from, or copy the folder `reference` of its run folder",
        )
    imported = imported_weights(state)
    if imported is not None:
        load_imported(state, imported)
    for rows in missing:
        logger.info("reference: what the model says of %d rows before training", len(rows))
        rows.references = reference_logprobs(state, rows)
        if is_main_rank():
            _write(_path(state, rows), rows.references)


def _known_starting_point(state: TrainState) -> tuple[str, Path | None]:
    """What the checkpoint that the run goes on from says (nothing in those of earlier versions), and its folder."""
    folder = checkpoint_to_load(state)
    if folder is None:
        return "", None
    return native.read_common(folder)["common"].get("starting_point", ""), folder


def _take_written(state: TrainState, rows: Dataset) -> bool:
    """Take what an earlier attempt has written; whether it has."""
    path = _path(state, rows)
    found = [np.load(path) if is_main_rank() and path.is_file() else None]
    dist.broadcast_object_list(found)
    if found[0] is None:
        return False
    logger.info("reference: %s", path)
    rows.references = found[0]
    return True


def _write(path: Path, references_NQ: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp.npy")
    np.save(unfinished, references_NQ)
    unfinished.rename(path)


def _path(state: TrainState, rows: Dataset) -> Path:
    """Of the file: another model, other rows or other weights of tokens need another."""
    facts = (state.starting_point, rows.index.digest, rows.encoder.fingerprint, state.recipe.train.precision)
    return run_path(state.recipe) / FOLDER / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.npy"


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
        some = Rows([one.batch for one in loaded], [one.pixels for one in loaded], inputs.shares)

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

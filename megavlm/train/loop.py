"""The training loop: steps, evaluation, checkpoints, logs. It names no training method."""

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megavlm.config.load import dump_recipe
from megavlm.observe.environment import collect_environment
from megavlm.observe.metrics import LOG_NAME, RunLog, StepMetrics, read_log
from megavlm.observe.progress import Progress
from megavlm.observe.report import write_report
from megavlm.train import answers, resume
from megavlm.train.optim import learning_rates
from megavlm.train.references import prepare_references
from megavlm.train.saving import Saver
from megavlm.train.state import TrainState, is_main_rank, run_path
from megavlm.train.step import Recording, StepResult, evaluate, train_step
from megavlm.train.timeline import record_timeline
from megavlm.train.voice import lost_peer

logger = logging.getLogger(__name__)


@dataclass
class _StopRequest:
    """Set by SIGTERM or SIGINT on this rank."""

    asked: bool = False


@contextlib.contextmanager
def _graceful_stop() -> Iterator[_StopRequest]:
    """Turn SIGTERM (what schedulers send before a time limit) and SIGUSR1 into a request to stop after this step."""
    request = _StopRequest()

    def ask(_number: int, _frame: Any) -> None:
        request.asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _any_rank(asked: bool, device: torch.device) -> bool:
    """Whether a rank was asked to stop; ranks must agree on the step after which they do."""
    return _largest([float(asked)], device)[0] > 0


def _largest(values: list[float], device: torch.device) -> list[float]:
    """Each value's largest over all ranks."""
    found = torch.tensor(values, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    largest: list[float] = found.tolist()
    return largest


class _Observer:
    """Log, progress and gallery of the main rank; does nothing on the others."""

    def __init__(self, state: TrainState, resumed: bool) -> None:
        self.state = state
        self.main = is_main_rank()
        self.log: RunLog | None = None
        folder = run_path(state.recipe)
        if self.main:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.yaml").write_text(dump_recipe(state.recipe), encoding="utf-8")
            self.log = RunLog(folder, state.recipe.observe.tensorboard, state.step if resumed else None)
        self.progress = Progress(state.total_steps, state.step, enabled=self.main, bar=state.recipe.observe.progress)
        self._reset()

    def _reset(self) -> None:
        self._since, self._tokens, self._images, self._steps = time.perf_counter(), 0, 0, 0
        self._data_wait_s = 0.0

    def event(self, event: str, text: str = "", **fields: Any) -> None:
        """Log that something happened, and say it."""
        if self.log is not None:
            self.log.log_event(self.state.step, event, text, **fields)
            self.progress.note(f"{event}: {text}" if text else event)

    def step_done(self, result: StepResult, rates: dict[str, float], data_wait_s: float) -> None:
        """Take a step's figures in, and how long the slowest rank waited for its data; log them when it is time."""
        state = self.state
        self._tokens += result.num_tokens
        self._images += result.num_images
        self._steps += 1
        self._data_wait_s += data_wait_s
        if state.step % state.recipe.observe.log_steps and state.step != state.total_steps:
            return
        elapsed = time.perf_counter() - self._since
        metrics = StepMetrics(
            step=state.step,
            loss=result.loss,
            num_tokens=result.count,
            grad_norm=result.norms.total,
            grad_norms=result.norms.by_component,
            learning_rates=rates,
            tokens_per_second=self._tokens / elapsed,
            images_per_second=self._images / elapsed,
            step_s=elapsed / self._steps,
            consumed_samples=state.plan.num_consumed(state.step),
            extra={"data_wait_s": self._data_wait_s / self._steps} | _extra(state, result),
        )
        if self.log is not None:
            self.log.log_train(metrics)
            self.progress.update(metrics)
        self._reset()

    def evaluated(self, values: dict[str, float]) -> None:
        """Log an evaluation; its time is no training time."""
        if self.log is not None:
            self.log.log_eval(self.state.step, values)
            self.progress.note(f"step {self.state.step}: evaluation loss {values['loss']:.4f}")
        self._reset()

    def saved(self, folder: str, seconds: float) -> None:
        """Log a checkpoint; its time is no training time."""
        self.event("save", folder, seconds=seconds)
        self._reset()

    def close(self) -> None:
        """Close the log and write the report."""
        if self.log is None:
            return
        self.log.close()
        if self.state.recipe.observe.report:
            path = write_report(run_path(self.state.recipe))
            logger.info("report: %s", path)


def _extra(state: TrainState, result: StepResult) -> dict[str, float]:
    """Further figures of a step; `consumed/<source>` are samples since training began, earlier attempts included."""
    extra = {"pad_share": result.pad_share} | result.figures
    if result.loss_scale is not None:
        extra |= {"loss_scale": result.loss_scale, "skipped": float(result.skipped)}
    if result.load_balancing_loss is not None:
        extra["load_balancing_loss"] = result.load_balancing_loss
    if state.plan.mixture is not None:
        consumed = state.plan.mixture.consumed(state.step)
        extra |= {f"consumed/{name}": float(count) for name, count in consumed.items()}
    return extra


def layout_name(state: TrainState) -> str:
    """Short name of the layout, e.g. `TP2+SP x PP2 x DP2`."""
    parallel = state.recipe.parallel
    tensor = parallel.tensor_model_parallel_size
    parts = [
        f"TP{tensor}" + ("+SP" if parallel.sequence_parallel else "") if tensor > 1 else "",
        f"PP{parallel.pipeline_model_parallel_size}" if parallel.pipeline_model_parallel_size > 1 else "",
        f"VPP{parallel.virtual_pipeline_model_parallel_size}"
        if parallel.virtual_pipeline_model_parallel_size > 1
        else "",
        f"CP{parallel.context_parallel_size}" if parallel.context_parallel_size > 1 else "",
        f"EP{parallel.expert_model_parallel_size}" if parallel.expert_model_parallel_size > 1 else "",
        f"DP{state.groups.topology.data}" if state.groups.topology.data > 1 else "",
    ]
    name = " x ".join(part for part in parts if part) or "one process"
    return name if parallel.vision_placement == "first_stage" else f"{name}, encoder {parallel.vision_placement}"


def train(state: TrainState) -> bool:
    """Run until the last step, or until somebody asks to stop.

    Returns:
        Whether training is complete; False after SIGTERM, with a checkpoint saved.

    Raises:
        RunError: a loss or gradient is not finite, or a checkpoint cannot be written.
        UseError: a row or image cannot be read.
    """
    prepare_references(state)
    folder = resume.resume(state)
    if folder is not None and _has_ended(state):
        logger.info("%s: nothing to do, %d of %d steps are done (%s)", state.recipe.name, state.step, state.total_steps,
                    folder)  # fmt: skip
        return True
    observer = _Observer(state, resumed=folder is not None)
    try:
        with _graceful_stop() as request, observer.progress:
            try:
                return _run(state, observer, request, str(folder) if folder else "")
            except RuntimeError as error:
                if request.asked and lost_peer(error):
                    # The launcher is ending every rank, because of one that has failed and said why.
                    raise SystemExit(128 + signal.SIGTERM) from error
                raise
    finally:
        state.loader.close()
        observer.close()


def _has_ended(state: TrainState) -> bool:
    """Whether an earlier attempt did everything, to the last answer. What the main rank sees decides."""
    log = run_path(state.recipe) / LOG_NAME
    done = state.step >= state.total_steps or state.early_stopping.stops
    if done and is_main_rank():
        done = log.is_file() and any(row.get("event") == "end" for row in read_log(log))
    return not _any_rank(not done, state.device)


def _run(state: TrainState, observer: _Observer, request: _StopRequest, resumed_from: str) -> bool:
    observer.event(
        "resume" if resumed_from else "start",
        resumed_from,
        total_steps=state.total_steps,
        layout=layout_name(state),
        world_size=dist.get_world_size(),
        environment=collect_environment(),
    )
    samples = answers.report_samples(state)
    gallery = run_path(state.recipe) / answers.SAMPLES_NAME
    before = None
    if samples:
        before = answers.answer(state, samples) if not resumed_from else answers.read_before(gallery)
        if observer.main:
            answers.write_samples(gallery, samples, before, None)
    if state.eval_set is not None and not resumed_from:
        _evaluate(state, observer)
    saved_step = state.step if resumed_from else -1
    saver = Saver(state, lambda folder, seconds: observer.saved(str(folder), seconds))
    stopping = False
    while state.step < state.total_steps and not stopping and not state.early_stopping.stops:
        rates = learning_rates(state.scheduler, state.learning, state.learning_components, state.step)
        recordings: list[Recording] | None = [] if state.step + 1 == state.recipe.observe.timeline_step else None
        result = train_step(state, state.step, recordings)
        state.step += 1
        if recordings:
            record_timeline(state, recordings[0], state.step, layout_name(state))
        asked, data_wait_s = _largest([float(request.asked), result.data_wait_s], state.device)
        stopping = asked > 0
        observer.step_done(result, rates, data_wait_s)
        saver.poll()
        if _due(state.step, state.recipe.train.eval_steps) and state.eval_set is not None and not stopping:
            _evaluate(state, observer)
        if stopping or _due(state.step, state.recipe.checkpoint.save_steps):
            saver.save()
            saved_step = state.step
    saver.finish()
    if stopping and state.step < state.total_steps:
        observer.event("stop", f"asked to stop; saved after step {state.step}")
        return False
    _finish(state, observer, saver, samples, before, saved_step)
    return True


def _evaluate(state: TrainState, observer: _Observer) -> None:
    values = evaluate(state)
    state.evaluation = (state.step, values["loss"])
    state.early_stopping.take(values["loss"])
    observer.evaluated(values)


def _finish(
    state: TrainState,
    observer: _Observer,
    saver: Saver,
    samples: list[Any],
    before: list[str] | None,
    saved: int,
) -> None:
    if state.eval_set is not None and not _due(state.step, state.recipe.train.eval_steps):
        _evaluate(state, observer)
    if samples:
        after = answers.answer(state, samples)
        if observer.main:
            answers.write_samples(run_path(state.recipe) / answers.SAMPLES_NAME, samples, before, after)
    if state.recipe.checkpoint.save_at_end and saved != state.step:
        saver.save()
        saver.finish()
    why = ": the loss on held-out rows does not fall any more" if state.early_stopping.stops else ""
    observer.event("end", f"{state.step} steps{why}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

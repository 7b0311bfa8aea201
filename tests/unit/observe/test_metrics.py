import json
import math

import pytest

from megavlm.errors import RunError, UseError
from megavlm.observe.environment import collect_environment
from megavlm.observe.metrics import ABANDONED_NAME, KEEP_ALL, LOG_NAME, RunLog, StepMetrics, read_log


def step_metrics(step, loss=1.5, **changes):
    values = {
        "step": step,
        "loss": loss,
        "num_tokens": 100.0,
        "grad_norm": 0.5,
        "grad_norms": {"vision": 0.3, "language": 0.4},
        "learning_rates": {"vision": 1e-4, "language": 1e-3},
        "tokens_per_second": 2000.0,
        "images_per_second": 10.0,
        "step_s": 0.5,
        "consumed_samples": 8 * step,
    }
    return StepMetrics(**(values | changes))


def write_steps(run_dir, steps, resume_step=None, loss=1.5):
    with RunLog(run_dir, tensorboard=False, resume_step=resume_step) as log:
        for step in steps:
            log.log_train(step_metrics(step, loss))


def train_steps(run_dir):
    return [row["step"] for row in read_log(run_dir / LOG_NAME) if row["kind"] == "train"]


def test_every_row_is_on_disk_before_the_log_is_closed(tmp_path):
    log = RunLog(tmp_path / "new" / "run", tensorboard=False)
    log.log_event(0, "start", "hello", layout="TP2")
    log.log_eval(0, {"loss": 5.0})
    log.log_train(step_metrics(1, extra={"accuracy": 0.25}))
    rows = read_log(tmp_path / "new" / "run" / LOG_NAME)
    log.close()
    log.close()
    assert [(row["kind"], row["step"]) for row in rows] == [("event", 0), ("eval", 0), ("train", 1)]
    assert rows[0]["event"] == "start" and rows[0]["text"] == "hello" and rows[0]["layout"] == "TP2"
    assert rows[1]["loss"] == 5.0
    assert rows[2]["grad_norms"] == {"vision": 0.3, "language": 0.4}
    assert rows[2]["extra"] == {"accuracy": 0.25}
    assert all(row["time"] > 0 for row in rows)


def test_values_that_are_not_finite_survive_in_strict_json(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log_train(step_metrics(1, math.nan, grad_norm=math.inf, grad_norms={"vision": -math.inf}))
    text = (tmp_path / LOG_NAME).read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads(text, parse_constant=refuse)
    (row,) = read_log(tmp_path / LOG_NAME)
    assert math.isnan(row["loss"])
    assert row["grad_norm"] == math.inf
    assert row["grad_norms"]["vision"] == -math.inf


def test_resume_drops_the_steps_that_will_be_done_again(tmp_path):
    write_steps(tmp_path, range(1, 10), loss=1.0)
    write_steps(tmp_path, range(7, 13), resume_step=6, loss=2.0)
    rows = read_log(tmp_path / LOG_NAME)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["loss"] for row in rows] == [1.0] * 6 + [2.0] * 6
    assert [row["step"] for row in read_log(tmp_path / ABANDONED_NAME)] == [7, 8, 9]


def test_a_second_resume_adds_to_what_was_abandoned(tmp_path):
    write_steps(tmp_path, range(1, 5))
    write_steps(tmp_path, range(3, 5), resume_step=2)
    write_steps(tmp_path, range(4, 7), resume_step=3)
    assert train_steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in read_log(tmp_path / ABANDONED_NAME)] == [3, 4, 4]


def test_a_new_run_in_an_old_folder_starts_an_empty_log(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log_eval(0, {"loss": 5.0})
        log.log_train(step_metrics(1))
    write_steps(tmp_path, [1, 2])
    assert [(row["kind"], row["step"]) for row in read_log(tmp_path / LOG_NAME)] == [("train", 1), ("train", 2)]
    assert [row["kind"] for row in read_log(tmp_path / ABANDONED_NAME)] == ["eval", "train"]


def test_keep_all_adds_to_a_finished_log(tmp_path):
    write_steps(tmp_path, [1, 2])
    with RunLog(tmp_path, tensorboard=False, resume_step=KEEP_ALL) as log:
        log.log_event(2, "evaluation", exact_match_before=0.0, exact_match_after=0.9)
    assert [row["kind"] for row in read_log(tmp_path / LOG_NAME)] == ["train", "train", "event"]
    assert not (tmp_path / ABANDONED_NAME).exists()


def test_a_step_is_never_logged_twice(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    with RunLog(tmp_path, tensorboard=False, resume_step=3) as log:
        with pytest.raises(AssertionError, match="step 3"):
            log.log_train(step_metrics(3))
        log.log_train(step_metrics(4))
    assert train_steps(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize("torn", [b'{"kind": "train", "st', b"\x00\x00\x00", b'{"kind": "train", "text": "\xc3', b"17"])
def test_a_torn_last_line_is_left_out_and_gone_after_resume(tmp_path, torn):
    write_steps(tmp_path, [1, 2])
    path = tmp_path / LOG_NAME
    path.write_bytes(path.read_bytes() + torn)
    assert train_steps(tmp_path) == [1, 2]
    write_steps(tmp_path, [3], resume_step=2)
    assert train_steps(tmp_path) == [1, 2, 3]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    write_steps(tmp_path, [1, 2])
    path = tmp_path / LOG_NAME
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    write_steps(tmp_path, [3], resume_step=2)
    assert train_steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("damage", ['{"kind": "tra', '{"step": 2}', "[1, 2]"])
def test_a_damaged_line_before_the_last_is_an_error_that_names_it(tmp_path, damage):
    write_steps(tmp_path, [1, 2, 3])
    path = tmp_path / LOG_NAME
    lines = path.read_text().splitlines()
    lines[1] = damage
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UseError, match=r"metrics\.jsonl line 2"):
        read_log(path)


def test_a_missing_log_is_an_error_that_names_the_path(tmp_path):
    with pytest.raises(UseError, match=LOG_NAME):
        read_log(tmp_path / LOG_NAME)


def test_a_folder_that_cannot_be_made_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot write the log"):
        RunLog(tmp_path / "file" / "run", tensorboard=False)


def test_tensorboard_holds_the_same_numbers_and_hides_abandoned_ones(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def scalars(tag):
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        return {event.step: event.value for event in events.Scalars(tag)}

    with RunLog(tmp_path, tensorboard=True) as log:
        for step in (1, 2, 3):
            log.log_train(step_metrics(step, float(step), extra={"accuracy": 0.5}))
        log.log_eval(3, {"loss": 0.75})
    assert scalars("train/loss") == {1: 1.0, 2: 2.0, 3: 3.0}
    assert scalars("eval/loss") == {3: 0.75}
    assert scalars("grad_norm/vision")[2] == pytest.approx(0.3)
    assert scalars("learning_rate/language")[2] == pytest.approx(1e-3)
    assert scalars("extra/accuracy")[1] == 0.5
    with RunLog(tmp_path, tensorboard=True, resume_step=1) as log:
        log.log_train(step_metrics(2, 20.0))
    assert scalars("train/loss") == {1: 1.0, 2: 20.0}


def test_the_environment_names_versions_and_no_host():
    import platform

    facts = collect_environment()
    assert facts["python"] == platform.python_version()
    assert "torch" in facts
    assert all(isinstance(value, str) for value in facts.values())
    assert platform.node() not in facts.values()

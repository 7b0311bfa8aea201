"""What the story needs beside megavlm's own commands; `examples/story.sh` has all of them in their order.

prepare    make images, rows and a tiny Qwen3-VL directory with random weights, in runs/story-input
ask NAME   let transformers answer a chapter's held-out questions, before and after it; add this to the run's log
check      write runs/story/summary.json and docs/evidence/story.json; 1 when a figure did not rise as it should
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from examples.data.story_rows import Sizes, all_texts, write_rows  # noqa: E402
from examples.data.tiny_qwen3vl import write_model_dir  # noqa: E402
from megavlm.config.load import load_recipe  # noqa: E402
from megavlm.data.rows import Rows  # noqa: E402
from megavlm.evaluate.metrics import exact_match  # noqa: E402
from megavlm.evaluate.transformers_generate import generate_answers  # noqa: E402
from megavlm.observe.metrics import KEEP_ALL, LOG_NAME, RunLog, read_log  # noqa: E402

RUNS, INPUT = Path("runs/story"), Path("runs/story-input")
TIMES_NAME = "times.txt"
MAX_NEW_TOKENS = 12
REQUIRED_WALL_S = 1800.0


@dataclasses.dataclass(frozen=True)
class Figure:
    """A held-out figure of a chapter, a share of 1.

    Attributes:
        chapter: folder of the run.
        name: field of the run's log: of evaluations, or of the event that `ask` adds, `_before` and `_after`.
        label: what it is.
        least_rise: by how much it has to be higher after the chapter.
        chance: what guessing reaches, where the log cannot say what was before: rewards are all 0 then.
    """

    chapter: str
    name: str
    label: str
    least_rise: float
    chance: float | None = None


FIGURES = (
    Figure("1_contrastive", "recall_at_1/image_to_text", "recall@1 of 200 captions", 0.3),
    Figure("2_words", "exact_match", "exact captions of typed forms", 0.5),
    Figure("3_align", "exact_match", "exact captions of images", 0.2),
    Figure("4_sft", "exact_match", "exact answers to questions", 0.3),
    Figure("5_dpo", "rewards/accuracies", "pairs whose better answer has the higher reward", 0.3, chance=0.5),
    Figure("5_dpo", "exact_match", "answers exactly as preferred", 0.3),
)


def say(text: str) -> None:
    """One line for the person who watches."""
    sys.stdout.write(f"story: {text}\n")
    sys.stdout.flush()


def prepare(seed: int) -> None:
    """Make everything from scratch; what an earlier story has left is removed."""
    for folder in (RUNS, INPUT):
        shutil.rmtree(folder, ignore_errors=True)
    sizes = Sizes()
    shown = write_rows(INPUT / "data", sizes, seed)
    assert not set(shown["train"]) & set(shown["heldout"])
    write_model_dir(INPUT / "model", all_texts(), seed)
    say(f"{sizes.num_images} training images and {sizes.num_heldout} held-out ones, no handwritten digit in both")


def ask(chapter: str) -> None:
    """Ask the directory that a chapter started from, and the one it was exported to, every held-out question."""
    run_dir = RUNS / chapter
    recipe = load_recipe(run_dir / "recipe.yaml")
    samples = list(Rows.open(list(recipe.data.eval)))
    truths = [sample.turns[-1].text for sample in samples]
    before, after = (
        exact_match(generate_answers(hf_dir, samples, MAX_NEW_TOKENS), truths)
        for hf_dir in (Path(recipe.model.hf_dir), run_dir / "hf")
    )
    last_step = read_log(run_dir / LOG_NAME)[-1]["step"]
    with RunLog(run_dir, tensorboard=False, resume_step=KEEP_ALL) as log:
        log.log_event(
            last_step,
            "evaluation",
            f"transformers.generate on {len(samples)} held-out rows",
            exact_match_before=before,
            exact_match_after=after,
            num_samples=len(samples),
        )
    say(f"{chapter}: {before:.1%} of the held-out answers exactly right before, {after:.1%} after")


def measured(figure: Figure, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """A figure before and after its chapter, out of the run's log."""
    if figure.name == "exact_match":
        (event,) = [row for row in rows if row.get("event") == "evaluation"]
        return event["exact_match_before"], event["exact_match_after"]
    shares = [row[figure.name] for row in rows if row["kind"] == "eval"]
    return shares[0] if figure.chance is None else figure.chance, shares[-1]


def cpu_seconds(chapter: str) -> float:
    """Seconds of CPU of all commands of the story so far, out of what bash's `times` said behind a chapter."""
    children = (RUNS / chapter / TIMES_NAME).read_text(encoding="utf-8").splitlines()[1]
    return sum(60 * float(minutes) + float(seconds) for minutes, seconds in re.findall(r"(\d+)m([\d.]+)s", children))


def check(wall_s: float) -> int:
    """Write down what was measured; the exit code says whether everything rose."""
    chapters = list(dict.fromkeys(figure.chapter for figure in FIGURES))
    logs = {chapter: read_log(RUNS / chapter / LOG_NAME) for chapter in chapters}
    found = [(figure, *measured(figure, logs[figure.chapter])) for figure in FIGURES]
    clocks = [0.0, *(cpu_seconds(chapter) for chapter in chapters)]
    cpu_s = {chapter: end - start for chapter, start, end in zip(chapters, clocks, clocks[1:], strict=False)}
    missed = [figure for figure, before, after in found if after < before + figure.least_rise]
    summary = {
        "figures": [dataclasses.asdict(figure) | {"before": one, "after": two} for figure, one, two in found],
        "cpu_s": {chapter: round(seconds, 1) for chapter, seconds in cpu_s.items()},
        "wall_s": wall_s,
        "report": str(RUNS / "report.html"),
    }
    (RUNS / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    record_evidence(found, cpu_s, wall_s)
    for figure, before, after in found:
        say(f"  {figure.chapter:<14} {before:>6.1%} -> {after:<6.1%} {figure.label}")
    say(f"{wall_s:.0f} s, {sum(cpu_s.values()):.0f} s of CPU; look at {summary['report']}")
    for figure in missed:
        say(f"missed: {figure.chapter}: {figure.label}: it was to rise by {figure.least_rise}")
    if wall_s > REQUIRED_WALL_S:
        say(f"missed: wall time: it was to be at most {REQUIRED_WALL_S:.0f} s, on two cores of its own")
    return 1 if missed or wall_s > REQUIRED_WALL_S else 0


def record_evidence(found: list[tuple[Figure, float, float]], cpu_s: dict[str, float], wall_s: float) -> None:
    """Write docs/evidence/story.json and story.md."""
    from tests.evidence import record, row

    command = "make story"
    rows = [
        row(
            f"{figure.chapter}: {figure.label}",
            after,
            unit="share",
            required=f">= {before + figure.least_rise:.3g}",
            reference="the same before the chapter" if figure.chance is None else "chance",
            reference_value=before,
            command=command,
        )
        for figure, before, after in found
    ]
    rows += [row(f"{chapter}: CPU time", seconds, unit="s", command=command) for chapter, seconds in cpu_s.items()]
    rows.append(row("wall time", wall_s, unit="s", required=f"<= {REQUIRED_WALL_S:.0f}", command=command))
    record("story", rows)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare").add_argument("--seed", type=int, default=0)
    commands.add_parser("ask").add_argument("chapter", metavar="NAME")
    commands.add_parser("check").add_argument("--wall-s", type=float, required=True, help="seconds of the whole story")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.command == "check":
        return check(args.wall_s)
    if args.command == "ask":
        ask(args.chapter)
    else:
        prepare(args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())

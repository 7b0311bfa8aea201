"""Iterative fine-tuning: a round answers questions, scores the answers, learns the best, and exports the model.

A round is a folder, and its phases leave a file or a folder each, which is there whole or not at all: what is there is
not done again. So a loop goes on where it was stopped, a batch system may run the phases one by one, and any engine may
write the answers in place of the first phase.
"""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.config.load import dump_recipe, load_recipe, recipe_to_dict
from megavlm.config.schema import Recipe
from megavlm.data.inspect.write_rows import write_rows
from megavlm.data.sample import Sample
from megavlm.errors import RunError, use_error
from megavlm.observe.metrics import LOG_NAME, read_log
from megavlm.train.kept import Answered, kept_answers, summary_of, with_answer

PHASES = ("sample", "score", "train", "export")
"""Of a round, in their order."""
RECIPE_NAME = "iterate.yaml"
_CHOOSING = {"iterate.reward", "iterate.reward_model", "iterate.threshold", "iterate.num_kept"}


@dataclass(frozen=True)
class Round:
    """One round of a recipe's loop.

    Attributes:
        recipe: of the loop.
        number: of the round, from 1.
    """

    recipe: Recipe
    number: int

    @property
    def folder(self) -> Path:
        """Where the round writes."""
        return Path(self.recipe.run_dir) / f"round_{self.number}"

    @property
    def model_dir(self) -> str:
        """The Hugging Face directory that the round begins with."""
        return self.recipe.model.hf_dir if self.number == 1 else str(Round(self.recipe, self.number - 1).exported)

    @property
    def answers(self) -> Path:
        """What the model answered: {"row", "answers"} a line."""
        return self.folder / "answers.jsonl"

    @property
    def scored(self) -> Path:
        """The same with rewards."""
        return self.folder / "scored.jsonl"

    @property
    def kept(self) -> Path:
        """Rows of what is learned."""
        return self.folder / "kept.jsonl"

    @property
    def summary(self) -> Path:
        """Counts and rewards."""
        return self.folder / "summary.json"

    @property
    def exported(self) -> Path:
        """The model behind the round, as a Hugging Face directory."""
        return self.folder / "exported"

    @property
    def checkpoints(self) -> Path:
        """Of its training."""
        return Path(self.training.run_dir) / "checkpoints"

    @property
    def answering(self) -> Recipe:
        """The recipe under which the questions are answered: the loop's, with the round's model."""
        model = dataclasses.replace(self.recipe.model, hf_dir=self.model_dir)
        peft = self.recipe.peft if self.number == 1 else dataclasses.replace(self.recipe.peft, adapters="")
        return dataclasses.replace(self.recipe, model=model, peft=peft, output_dir=str(self.folder), name="sampling")

    @property
    def training(self) -> Recipe:
        """The recipe under which what was kept is learned."""
        own = self.recipe.data.train if self.recipe.iterate.keeps_rows else ()
        data = dataclasses.replace(self.recipe.data, train=(str(self.kept), *own))
        return dataclasses.replace(self.answering, name="train", data=data)

    def is_done(self, phase: str) -> bool:
        """Whether a phase has left what it is for."""
        if phase == "train":
            log = Path(self.training.run_dir) / LOG_NAME
            return log.is_file() and any(row.get("event") == "end" for row in read_log(log))
        return {"sample": self.answers, "score": self.kept, "export": self.exported}[phase].exists()


def hold_recipe(recipe: Recipe) -> None:
    """Keep the loop's recipe in its folder; a loop goes on under the recipe that it began with, or for more rounds.

    How answers are chosen may change until some have been chosen.

    Raises:
        UseError: it began under another.
    """
    path = Path(recipe.run_dir) / RECIPE_NAME
    if path.is_file():
        before, now = (_flat(one) for one in (load_recipe(path), recipe))
        free = {"iterate.num_rounds"} | (set() if Round(recipe, 1).is_done("score") else _CHOOSING)
        different = [key for key in now if key not in free and before.get(key) != now[key]]
        if different:
            raise use_error(
                different[0],
                now[different[0]],
                f"{before.get(different[0])}, as the rounds in {path.parent} were run with",
                "keep it to go on, or choose another name",
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_recipe(recipe), encoding="utf-8")


def _flat(recipe: Recipe) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, values in recipe_to_dict(recipe).items():
        if isinstance(values, dict):
            flat |= {f"{section}.{name}": value for name, value in values.items()}
        else:
            flat[section] = values
    return flat


def write_answered(path: Path, answered: Iterable[Answered]) -> None:
    """Write answers, under another name until all are there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    with unfinished.open("w", encoding="utf-8") as file:
        for one in answered:
            rewards = {"rewards": one.rewards} if one.rewards else {}
            file.write(json.dumps({"row": one.row, "answers": one.answers} | rewards, ensure_ascii=False) + "\n")
    unfinished.replace(path)


def read_answered(path: Path) -> list[Answered]:
    """What `write_answered` wrote, or another engine in its form.

    Raises:
        UseError: naming the line that has another form.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            answers = tuple(row["answers"])
            if not isinstance(row["row"], int) or not all(one is None or isinstance(one, str) for one in answers):
                raise TypeError("row is a number, answers are texts or null")
        except (ValueError, KeyError, TypeError) as error:
            raise use_error(
                f"{path}:{number}", f"{line[:60]} ({error})", '{"row": 0, "answers": ["...", null]}', "write it anew"
            ) from error
        found.append(Answered(row["row"], answers, tuple(row.get("rewards", ()))))
    return found


def keep(this: Round, samples: dict[int, Sample], answered: list[Answered]) -> dict[str, Any]:
    """Write what is learned of scored answers, and the round's summary, which is returned.

    Args:
        this: the round.
        samples: its rows by number.
        answered: with rewards.

    Raises:
        RunError: nothing is.
    """
    write_answered(this.scored, answered)
    kept = [kept_answers(one, this.recipe.iterate) for one in answered]
    summary = {"round": this.number} | summary_of(answered, kept)
    this.summary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if not summary["kept"]:
        raise RunError(
            f"round {this.number}: of {summary['answers']} answers none reaches iterate.threshold "
            f"{this.recipe.iterate.threshold:g} ({this.scored}); lower it, or begin with a model that knows more"
        )
    rows = [
        (with_answer(samples[one.row], text), {"reward": reward})
        for one, pairs in zip(answered, kept, strict=True)
        for text, reward in pairs
    ]
    write_rows((row for row, _ in rows), this.kept, (columns for _, columns in rows))
    return summary

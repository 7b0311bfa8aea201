"""The recipe's section on iterative fine-tuning, and its checks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megavlm.errors import use_error

if TYPE_CHECKING:
    from megavlm.config.schema import Recipe


@dataclass(frozen=True)
class IterateConfig:
    """`megavlm iterate`: rounds of answering the training rows' questions, and learning the best of the answers."""

    num_rounds: int = 3
    num_generations: int = 4
    """Answers to each question in a round."""
    num_rows: int = 0
    """Questions of a round, drawn anew for each; 0: all rows."""
    temperature: float = 1.0
    max_completion_length: int = 64
    """Tokens of an answer at most; one that has not ended by then is not learned."""
    generation_batch_size: int = 32
    """Answers that are written together, as one packed row."""
    reward: Literal["exact_match", "reward_model"] = "exact_match"
    """exact_match: 1 for the row's own answer, white space around it aside, else 0. reward_model: its score."""
    reward_model: str = ""
    """Hugging Face directory of a reward model (train.stage rm)."""
    threshold: float = 0.5
    """Answers with less reward are not learned."""
    num_kept: int = 1
    """So many answers to a question are learned at most, those with the highest reward; 0: all above the threshold."""
    keeps_rows: bool = False
    """Learn the rows themselves, too, in every round."""


def check_iterate(recipe: "Recipe") -> None:
    """What `megavlm iterate` wants of a recipe.

    Raises:
        UseError: the first mistake found.
    """
    from megavlm.config.tuning import tuning_plan

    knobs = recipe.iterate
    if recipe.train.stage != "sft":
        raise use_error("train.stage", recipe.train.stage, "sft with `megavlm iterate`", "set train.stage=sft")
    if recipe.data.mixture:
        raise use_error("data.mixture", "sources", "data.train with `megavlm iterate`", "list the rows in data.train")
    if recipe.checkpoint.load_dir or not recipe.checkpoint.save_at_end:
        key = "checkpoint.load_dir" if recipe.checkpoint.load_dir else "checkpoint.save_at_end"
        raise use_error(
            key,
            vars(recipe.checkpoint)[key.rpartition(".")[2]],
            "rounds that begin with model.hf_dir and end with a checkpoint",
            f"remove {key}",
        )
    if (knobs.reward == "reward_model") != bool(knobs.reward_model):
        raise use_error(
            "iterate.reward_model",
            f"`{knobs.reward_model}` with iterate.reward {knobs.reward}",
            "a directory with reward_model, and none with exact_match",
            "set both, or neither",
        )
    if knobs.temperature == 0 and knobs.num_generations > 1:
        raise use_error(
            "iterate.temperature",
            f"0 with num_generations {knobs.num_generations}",
            "more than 0: answers would all be the same",
            "set it to 1, or num_generations to 1",
        )
    methods = {rule.tuning.method for rule in tuning_plan(recipe).rules} - {"full", "frozen", "lora", "ia3"}
    if methods:
        raise use_error(
            "peft.tuner_type",
            f"{min(methods)} with `megavlm iterate`",
            "full, lora or ia3: each round begins with the weights of the round before, adapters merged",
            "set peft.tuner_type=lora",
        )

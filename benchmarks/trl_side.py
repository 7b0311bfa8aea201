"""The other side of `benchmarks.train_step`: TRL's trainers on rows that are tokenised already, in their own process.

    python -m benchmarks.trl_side ARGUMENTS.json

Reads stage, model, rows, sizes and rates, and prints one line of JSON: seconds and loss of each step. Rows are in the
order in which they are to be seen; TRL's own shuffling is off.
"""
# ruff: noqa: T201 (a program: it prints)

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    """Train and print."""
    knobs = json.loads(Path(sys.argv[1]).read_text())
    import torch
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, AutoTokenizer, TrainerCallback
    from transformers.trainer_utils import set_seed

    torch.set_num_threads(1)
    set_seed(0)

    class Stopwatch(TrainerCallback):
        """Seconds of each step, from its first forward pass to the end of its update."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []
            self._since = 0.0

        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            self._since = time.process_time()

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            self.seconds.append(time.process_time() - self._since)

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, Any], **_kwargs: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    stopwatch = Stopwatch()
    model = AutoModelForImageTextToText.from_pretrained(knobs["model"], dtype=torch.float32)
    # Or the trainer averages the means of its microbatches (transformers says so of this family), where we and, with
    # this, TRL too divide by all tokens of the step: with rows of several lengths that is another loss.
    model.accepts_loss_kwargs = True
    tokenizer = AutoTokenizer.from_pretrained(knobs["model"])
    trainer = _trainer(knobs, model, tokenizer, Dataset.from_list(knobs["rows"]), stopwatch)
    trainer.train()
    print(json.dumps({"seconds": stopwatch.seconds, "losses": stopwatch.losses}))
    return 0


def _trainer(knobs: dict[str, Any], model: Any, tokenizer: Any, rows: Any, stopwatch: Any) -> Any:
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    common: dict[str, Any] = {
        "output_dir": knobs["output_dir"],
        "per_device_train_batch_size": knobs["micro_batch_size"],
        "gradient_accumulation_steps": knobs["batch_size"] // knobs["micro_batch_size"],
        "max_steps": knobs["num_steps"],
        "learning_rate": knobs["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        "dataloader_num_workers": 0,
    }

    class InOrder:
        """Rows as they are, one after the other."""

        def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(rows)

    classes = {"sft": SFTTrainer, "dpo": DPOTrainer}
    trainer_class = type("Ordered", (InOrder, classes[knobs["stage"]]), {})
    if knobs["stage"] == "sft":
        arguments: Any = SFTConfig(**common, completion_only_loss=True)
    else:
        arguments = DPOConfig(**common, beta=knobs["beta"], precompute_ref_log_probs=True)
    return trainer_class(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[stopwatch]
    )


if __name__ == "__main__":
    sys.exit(main())

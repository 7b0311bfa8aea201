"""A training step of ours against TRL's, and against bare torch: the same model, rows, batches and thread.

    python -m benchmarks.train_step [--steps 6]

- SFT and DPO on rows of one length against TRL's trainers: seconds a step. DPO's reference is computed before on both
  sides. The first losses must agree, so that the same is computed.
- SFT and DPO on rows of mixed length: tokens of rows a second, packed here, padded there.
- A step over forward pass, backward pass and optimizer of the same modules in a plain loop.

Sides take turns; ratios are of the best steps of each. Exit code 1 when a required figure is missed.
"""
# ruff: noqa: T201 (a program: it prints)

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real import TEXT, VISION
from megavlm.config.schema import DataConfig, ModelConfig, ObserveConfig, OptimizerConfig, Recipe, TrainConfig
from megavlm.config.stage_knobs import PreferenceConfig
from tests.evidence import record, row
from tests.pool import WorkerPool

COMMAND = "make bench-train"
LARGER = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6}
TOWER = VISION | {"depth": 4, "out_hidden_size": 512}
BATCH_SIZE, MICRO_BATCH_SIZE, NUM_TURNS, NUM_WARM, LR, BETA = 8, 4, 2, 1, 1e-4, 0.1
LONGEST = 1024
LEAST_SPEED, LEAST_MIXED, MOST_OVERHEAD = 1.0, 2.0, 1.10
LOSS_LIMIT = 1e-4


def write_rows(path: Path, num_rows: int, mixed: bool) -> None:
    """Rows of text with two answers, of one length or of lengths from 8 to 600 words (lognormal)."""
    random = np.random.RandomState(3)
    words = "a red square and the blue circle over brown fox dog largest".split()

    def text(count: int) -> str:
        return " ".join(random.choice(words, count))

    lines = []
    for _ in range(num_rows):
        length = int(np.exp(random.normal(np.log(60), 1.1)).clip(8, 600)) if mixed else 240
        turns = [{"role": "user", "content": text(length // 2)}, {"role": "assistant", "content": text(length // 2)}]
        worse = text(max(4, int(length * random.uniform(0.2, 0.8))) if mixed else length // 2)
        lines.append(json.dumps({"messages": turns, "rejected_response": worse}))
    path.write_text("\n".join(lines) + "\n")


def recipe_of(root: Path, stage: str, mixed: bool) -> Recipe:
    """Rows in file order; of mixed length they are packed by cost."""
    return Recipe(
        name=f"{stage}_{mixed}",
        output_dir=str(root / "runs"),
        model=ModelConfig(hf_dir=str(root / "model")),
        data=DataConfig(
            train=(str(root / f"{'mixed' if mixed else 'equal'}.jsonl"),),
            shuffle=False,
            max_length=LONGEST,
            packing=mixed,
            packing_length=2 * LONGEST,
        ),
        train=TrainConfig(
            stage=stage,  # type: ignore[arg-type]
            train_iters=100,
            precision="fp32",
            micro_batch_size=1 if mixed else MICRO_BATCH_SIZE,
            global_batch_size=BATCH_SIZE,
        ),
        preference=PreferenceConfig(beta=BETA) if stage == "dpo" else PreferenceConfig(),
        optimizer=OptimizerConfig(lr=LR, lr_decay_style="constant"),
        observe=ObserveConfig(tensorboard=False, progress=False, report=False),
    )


def ours(recipe: Recipe, num_steps: int) -> dict[str, list[float]]:
    """In a worker: seconds (of the processor: there is one thread), loss and tokens of each step."""
    from megavlm.train.references import reference_logprobs
    from megavlm.train.state import build_state
    from megavlm.train.step import train_step

    state = build_state(recipe)
    if recipe.train.stage == "dpo":
        state.train_set.references = reference_logprobs(state, state.train_set)
    found: dict[str, list[float]] = {"seconds": [], "losses": [], "tokens": []}
    for step in range(num_steps):
        since = time.process_time()
        result = train_step(state, step)
        found["seconds"].append(time.process_time() - since)
        found["losses"].append(result.loss)
        found["tokens"].append(float(result.num_tokens))
    state.loader.close()
    return found


def rows_for_trl(recipe: Recipe) -> list[dict[str, Any]]:
    """In a worker: the same rows as TRL takes them when they are tokenised."""
    from megavlm.train.state import build_state

    state = build_state(recipe)
    rows: list[dict[str, Any]] = []
    for index in range(len(state.train_set)):
        row = state.train_set.encoded(index)
        tokens, learned = row.tokens_S, row.loss_weights_S() > 0
        parts = []
        for part in row.parts:
            ids, mask = tokens[part], learned[part]
            last = int(np.flatnonzero(mask)[-1]) + 1  # the template's line break behind the answer helps nobody
            parts.append((ids[:last].tolist(), mask[:last].astype(int).tolist()))
        if recipe.train.stage == "sft":
            ids, mask = parts[0]
            rows.append(
                {"input_ids": ids, "labels": [token if own else -100 for token, own in zip(ids, mask, strict=True)]}
            )
        else:
            start = parts[0][1].index(1)
            assert parts[0][0][:start] == parts[1][0][:start]
            rows.append(
                {
                    "prompt_ids": parts[0][0][:start],
                    "chosen_ids": parts[0][0][start:],
                    "rejected_ids": parts[1][0][start:],
                }
            )
    return rows


def theirs(root: Path, recipe: Recipe, rows: list[dict[str, Any]], num_steps: int) -> dict[str, list[float]]:
    """TRL on the same rows, in a process of its own."""
    knobs = {
        "stage": recipe.train.stage,
        "model": recipe.model.hf_dir,
        "rows": rows,
        "batch_size": BATCH_SIZE,
        "micro_batch_size": MICRO_BATCH_SIZE,
        "num_steps": num_steps,
        "lr": LR,
        "beta": BETA,
        "output_dir": str(root / "trl"),
    }
    path = root / "knobs.json"
    path.write_text(json.dumps(knobs))
    environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    # In a session of its own, as a worker of the pool is: where a scheduler shares out by sessions, both get alike.
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.trl_side", str(path)],
        capture_output=True,
        text=True,
        env=environment,
        start_new_session=True,
    )
    if done.returncode:
        raise RuntimeError(f"TRL failed:\n{done.stderr[-3000:]}")
    found: dict[str, list[float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def bare(recipe: Recipe, num_steps: int) -> dict[str, list[float]]:
    """In a worker: a plain loop over the same modules and the same packed rows, with torch's AdamW."""
    import torch

    from megavlm.checkpoint.hf_load import load_weights
    from megavlm.losses.cross_entropy import cross_entropy
    from megavlm.models.build import build_encoder, build_language_chunks, transformer_config
    from megavlm.train.pipeline_work import run_chunk
    from megavlm.train.state import build_state
    from megavlm.train.step import load_rows

    state = build_state(recipe)
    directory, groups = state.directory, state.groups
    # Not the wrapped ones, whose gradients go into buffers.
    config = transformer_config(directory.architecture, recipe.model, recipe.parallel, recipe.train.precision)
    (model,) = build_language_chunks(directory.architecture, config, recipe.model, groups)
    encoder = build_encoder(directory.family, directory.architecture, config, recipe.model.backend, groups)
    assert encoder is not None
    load_weights(directory, [model, encoder])
    parameters = [one for part in (model, encoder) for one in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    found: dict[str, list[float]] = {"seconds": [], "losses": []}
    for step in range(num_steps):
        batches = load_rows(state, step).batches
        since = time.process_time()
        optimizer.zero_grad()
        count = sum(float(batch.loss_weights_T.sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            logits = run_chunk(model, batch, None, state.device)
            loss, _, _ = cross_entropy(logits, batch.labels_T, batch.loss_weights_T, groups.tensor)
            (loss / count).backward()
            total += float(loss.detach()) / count
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        found["seconds"].append(time.process_time() - since)
        found["losses"].append(total)
    state.loader.close()
    return found


def _agree(name: str, first: float, second: float) -> None:
    if not abs(first - second) <= LOSS_LIMIT * max(abs(first), 1.0):
        raise RuntimeError(f"{name}: the first losses are {first} and {second}: not the same training")


def compare(pool: WorkerPool, root: Path, stage: str, mixed: bool, num_steps: int) -> tuple[float, float]:
    """Ours and TRL's tokens of rows a second."""
    recipe = recipe_of(root, stage, mixed)
    (rows,) = pool.run("benchmarks.train_step:rows_for_trl", recipe=recipe)
    speeds: dict[str, list[float]] = {"ours": [], "TRL": []}
    for _ in range(NUM_TURNS):
        (mine,) = pool.run("benchmarks.train_step:ours", recipe=recipe, num_steps=num_steps + NUM_WARM, timeout_s=600.0)
        other = theirs(root, recipe, rows, num_steps + NUM_WARM)
        _agree(f"{stage}, {'mixed' if mixed else 'equal'} lengths", mine["losses"][0], other["losses"][0])
        tokens = sum(mine["tokens"][NUM_WARM:])  # of the same rows on both sides
        for name, found in (("ours", mine), ("TRL", other)):
            speeds[name].append(tokens / sum(found["seconds"][NUM_WARM:]))
    return max(speeds["ours"]), max(speeds["TRL"])


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; 1 if a required one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each run")
    options = parser.parse_args(arguments)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    from tests.tiny import write_tiny_qwen3vl

    pool, found, missed = WorkerPool(1), [], False
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_tiny_qwen3vl(root / "model", text_changes=TEXT | LARGER, vision_changes=TOWER)
        for name, mixed in (("equal", False), ("mixed", True)):
            write_rows(root / f"{name}.jsonl", BATCH_SIZE * (options.steps + NUM_WARM), mixed)
        try:
            for stage in ("sft", "dpo"):
                for mixed in (False, True):
                    mine, other = compare(pool, root, stage, mixed, options.steps)
                    least = LEAST_MIXED if mixed else LEAST_SPEED
                    lengths = "mixed lengths, packed here, padded there" if mixed else "rows of one length"
                    missed |= mine / other < least
                    what = "reached" if mine / other >= least else "MISSED"
                    print(f"  {what}: {stage}, {lengths}: {mine / other:.2f} x TRL's tokens a second, at least {least}")
                    found.append(
                        row(
                            f"{stage.upper()} step, {lengths}: tokens a second over TRL's",
                            mine / other,
                            unit="ratio, same model, rows and thread",
                            required=f">= {least}",
                            reference="TRL 1.16, tokens/s",
                            reference_value=other,
                            command=COMMAND,
                        )
                    )
            recipe = recipe_of(root, "sft", False)
            times: dict[str, list[float]] = {"ours": [], "bare": []}
            for _ in range(NUM_TURNS):
                losses = []
                for name in times:
                    (one,) = pool.run(
                        f"benchmarks.train_step:{name}",
                        recipe=recipe,
                        num_steps=options.steps + NUM_WARM,
                        timeout_s=600.0,
                    )
                    times[name] += one["seconds"][NUM_WARM:]
                    losses.append(one["losses"][0])
                _agree("step over bare torch", *losses)
        finally:
            pool.close()
    overhead = min(times["ours"]) / min(times["bare"])
    missed |= overhead > MOST_OVERHEAD
    what = "reached" if overhead <= MOST_OVERHEAD else "MISSED"
    print(f"  {what}: step over bare torch {overhead:.3f}, at most {MOST_OVERHEAD} ({min(times['bare']):.2f} s bare)")
    found.append(
        row(
            "SFT step over forward, backward and optimizer of the same modules in a plain loop",
            overhead,
            unit="ratio of the shortest steps",
            required=f"<= {MOST_OVERHEAD}",
            reference="plain torch loop, s",
            reference_value=min(times["bare"]),
            command=COMMAND,
        )
    )
    record("train", found)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

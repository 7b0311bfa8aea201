"""What workers on GPUs run."""

import statistics
import time

import torch

from megavlm.config.schema import Recipe
from megavlm.config.validate import validate_recipe
from megavlm.train.state import build_state, sample_costs
from megavlm.train.step import train_step


def throughput(recipe: Recipe, num_warm_up: int, num_steps: int) -> dict[str, float]:
    """Train, and time the steps behind the first ones; every rank waits for its device at each step's end.

    The rows must cost the same, so that the FLOPs of a step are those of any of its samples.
    """
    validate_recipe(recipe)
    state = build_state(recipe)
    costs = sample_costs(recipe, state.train_set, state.costs)
    flops = float((costs.encoder_N + costs.language_N).mean()) * recipe.train.global_batch_size
    times_s, tokens, images = [], 0, 0
    for step in range(num_warm_up + num_steps):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        result = train_step(state, step)
        torch.cuda.synchronize()
        if step >= num_warm_up:
            times_s.append(time.perf_counter() - started_s)
            tokens, images = result.num_tokens, result.num_images
    state.loader.close()
    step_s = statistics.median(times_s)
    return {
        "step_s": step_s,
        "tokens_per_s": tokens / step_s,
        "images_per_s": images / step_s,
        "flops_per_s": 3 * flops / step_s,
    }

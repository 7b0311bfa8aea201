"""How much the loss depends on each layer's adapters: the empirical Fisher information, row by row."""

import dataclasses

import torch

from megavlm.config.schema import ParallelConfig, Recipe
from megavlm.config.tuning import tuning_plan
from megavlm.errors import use_error
from megavlm.models.names import component_of, layer_of, named_parameters
from megavlm.peft.rank_allocation import Layer, LayerInformation
from megavlm.train.state import build_state
from megavlm.train.step import train_step


def measure_information(recipe: Recipe, num_rows: int) -> dict[Layer, LayerInformation]:
    """Squared gradients of LoRA's matrices B where training begins, one row at a time, in this one process.

    There B is 0, and its gradient is that of the weight itself, seen through A; A has none yet.

    Args:
        recipe: with LoRA.
        num_rows: training rows to look at, in the order of training.

    Returns:
        By component and layer, in the model's order.

    Raises:
        UseError: the recipe tunes nothing by LoRA, or begins with adapters that have learned already.
    """
    if not any(rule.tuning.method == "lora" for rule in tuning_plan(recipe).rules) or recipe.peft.adapters:
        raise use_error(
            "peft.tuner_type",
            f"{recipe.peft.tuner_type}{' with peft.adapters' if recipe.peft.adapters else ''}",
            "lora from its beginning, whose ranks are to be given out",
            "set peft.tuner_type=lora, and remove peft.adapters",
        )
    state = build_state(_row_by_row(recipe, num_rows))
    squares: dict[Layer, torch.Tensor] = {}
    costs: dict[Layer, int] = {}
    parameters = [(name, one) for model in state.models for name, one in named_parameters(model)]
    for name, parameter in parameters:
        if name.endswith((".lora_A", ".lora_B")):
            layer = component_of(name), layer_of(name)
            rank = tuning_plan(recipe).of(*layer).rank
            costs[layer] = costs.get(layer, 0) + parameter.numel() // rank
    for step in range(num_rows):
        train_step(state, step)
        for name, parameter in parameters:
            if name.endswith(".lora_B"):
                layer = component_of(name), layer_of(name)
                square = vars(parameter)["main_grad"].double().square().sum()
                squares[layer] = squares.get(layer, torch.zeros_like(square)) + square
    state.loader.close()
    return {layer: LayerInformation(float(squares[layer]) / num_rows, costs[layer]) for layer in costs}


def _row_by_row(recipe: Recipe, num_rows: int) -> Recipe:
    """Steps of one row that change nothing."""
    return dataclasses.replace(
        recipe,
        parallel=ParallelConfig(use_distributed_optimizer=False),
        data=dataclasses.replace(recipe.data, packing=False, packing_length=0, eval=()),
        train=dataclasses.replace(
            recipe.train, train_iters=num_rows, num_train_epochs=0.0, global_batch_size=1, micro_batch_size=1
        ),
        optimizer=dataclasses.replace(
            recipe.optimizer,
            lr=0.0,
            vit_lr=-1.0,
            aligner_lr=-1.0,
            min_lr=0.0,
            unfreeze="",
            unfreeze_warmup_iters=0,
            weight_decay=0.0,
            clip_grad=0.0,
        ),
    )

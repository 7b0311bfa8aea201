"""`megavlm ranks`: LoRA's ranks layer by layer, within a budget of parameters, by Fisher information."""

import argparse
import sys

SUMMARY = "give out LoRA's ranks to layers by Fisher information, within a budget of parameters"

EPILOG = """\
Looks at some training rows of the recipe, in one process: where the loss depends more on a layer's weights, the layer
gets a higher rank. Prints the line for the recipe, peft.components, in which each layer keeps the scaling that the
recipe's lora_rank and lora_alpha give. Without --budget, as many parameters are given out as the recipe has.

example:
  megavlm ranks examples/recipes/tiny_qwen3_vl.yaml peft.tuner_type=lora --rows 8 --max-rank 32
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EPILOG
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="recipe keys to change")
    parser.add_argument("--budget", type=int, default=0, help="parameters of all adapters (default: the recipe's)")
    parser.add_argument("--rows", type=int, default=64, help="training rows to look at (default: 64)")
    parser.add_argument("--max-rank", type=int, default=64, help="highest rank of a layer (default: 64)")


def run(args: argparse.Namespace) -> int:
    """Measure, and print."""
    from megavlm.config.load import load_recipe
    from megavlm.config.validate import validate_recipe
    from megavlm.errors import use_error
    from megavlm.platform.start import start

    recipe = load_recipe(args.recipe, args.overrides)
    validate_recipe(recipe)
    for option, value in (("--rows", args.rows), ("--max-rank", args.max_rank)):
        if value < 1:
            raise use_error(option, value, "at least 1", f"leave {option} out for its default")
    start()
    from megavlm.config.tuning import COMPONENTS, tuning_plan
    from megavlm.parallel.groups import join_world
    from megavlm.peft.rank_allocation import allocate_ranks, as_components
    from megavlm.train.information import measure_information
    from megavlm.train.run import leaving_world

    join_world(recipe.train.distributed_timeout_s)
    with leaving_world():
        layers = measure_information(recipe, args.rows)
    plan = tuning_plan(recipe)
    given = sum(one.num_parameters * plan.of(*layer).rank for layer, one in layers.items())
    ranks = allocate_ranks(layers, args.budget or given, args.max_rank)
    frozen = {name: not any(layer[0] == name for layer in layers) for name in COMPONENTS}
    spent = sum(layers[layer].num_parameters * rank for layer, rank in ranks.items())
    lines = [
        f"{component}{'' if number is None else f' layer {number}'}: information {one.information:.3g}, "
        f"rank {ranks[component, number]}"
        for (component, number), one in layers.items()
    ]
    lines.append(f"{spent} parameters of {args.budget or given}")
    lines.append(f"peft.components: {as_components(ranks, frozen, recipe.peft)}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0

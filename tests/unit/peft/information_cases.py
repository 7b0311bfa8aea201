"""What the workers run: Fisher information of layers."""

from megavlm.config.schema import Recipe
from megavlm.peft.rank_allocation import Layer, LayerInformation
from megavlm.train.information import measure_information


def measure(recipe: Recipe, num_rows: int) -> dict[Layer, LayerInformation]:
    """In this process."""
    return measure_information(recipe, num_rows)

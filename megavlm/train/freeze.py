"""Which components learn."""

from collections.abc import Iterable

from megavlm.config.schema import OptimizerConfig
from megavlm.models.names import Part, component_of


def frozen_components(optimizer: OptimizerConfig) -> frozenset[str]:
    """Components (`vision`, `projector`, `language`) that keep their weights."""
    choices = {"vision": optimizer.freeze_vit, "projector": optimizer.freeze_aligner, "language": optimizer.freeze_llm}
    return frozenset(name for name, frozen in choices.items() if frozen)


def freeze(models: Iterable[Part], optimizer: OptimizerConfig) -> None:
    """Freeze by component. Call before DDP wraps the model: it makes gradient buffers for what learns only."""
    frozen = frozen_components(optimizer)
    for model in models:
        for name, parameter in model.named_parameters():
            if component_of(name) in frozen:
                parameter.requires_grad_(False)

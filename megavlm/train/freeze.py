"""Which weights learn."""

from collections.abc import Iterable

from megavlm.config.tuning import COMPONENTS, TuningPlan
from megavlm.models.embedding_head import EMBEDDING_NAMES, MATCH_NAMES
from megavlm.models.mask_head import NATIVE_NAMES as MASK_NAMES
from megavlm.models.names import Part, component_of, is_adapter, layer_of, named_parameters
from megavlm.models.score import NATIVE_NAME


def learning_components(plan: TuningPlan) -> list[str]:
    """Components (`vision`, `projector`, `language`) of which anything learns, in this order."""
    return [name for name in COMPONENTS if plan.learns(name)]


def freeze(models: Iterable[Part], plan: TuningPlan) -> None:
    """Freeze what the plan does not let learn; adapters learn, and a reward model's head with the language model.

    A head for embeddings always learns: a frozen language model is how a tower alone is trained by what texts say. So
    does a head for masks, beside adapters too.

    Call before DDP wraps the model: it makes gradient buffers for what learns only.
    """
    for model in models:
        for name, parameter in named_parameters(model):
            learns = is_adapter(name) or plan.of(component_of(name), layer_of(name)).method == "full"
            # The new heads lie where the output layer over words does, under its name.
            language = model.architecture.language
            learns |= language.head == "scores" and name == NATIVE_NAME and plan.learns("language")
            learns |= language.embedding_dim > 0 and name in EMBEDDING_NAMES | MATCH_NAMES
            learns |= name in MASK_NAMES
            if not learns:
                parameter.requires_grad_(False)

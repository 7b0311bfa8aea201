"""Text decoders: what is assumed when a config leaves a key out is what transformers assumes."""

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from tests.pool import PoolKeeper

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def read_defaults() -> dict[str, dict[str, object]]:
    """Defaults of every decoder, on a worker."""
    from megavlm.models.decoders import DECODERS

    return {name: dict(decoder.defaults) for name, decoder in DECODERS.items()}


def test_defaults_are_those_of_transformers(workers: PoolKeeper) -> None:
    (found,) = workers(1).run(read_defaults)
    assert found.keys() == CONFIGS.keys()
    for name, defaults in found.items():
        theirs = CONFIGS[name]().to_dict()
        theirs["rope_theta"] = theirs["rope_parameters"]["rope_theta"]
        assert defaults == {key: theirs[key] for key in defaults}, name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"model_type": "mistral"}, "sliding_window: got 4096; expected null"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window: got True; expected False"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias: got True; expected False"),
        ({"model_type": "phi"}, "model_type: got 'phi'; expected one of llama, mistral, qwen2, qwen3"),
        ({"model_type": "mistral", "sliding_window": None}, ""),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act: got gelu; expected silu"),
    ],
)
def test_what_is_refused(workers: PoolKeeper, text: dict[str, object], message: str) -> None:
    (said,) = workers(1).run(read, text=text)
    assert message in said and bool(message) == bool(said)


def read(text: dict[str, object]) -> str:
    """The error of reading a config, on a worker."""
    from megavlm.errors import UseError
    from megavlm.models.decoders import read_decoder

    try:
        read_decoder(text)
    except UseError as error:
        return str(error)
    return ""

"""Text-only language models by the `model_type` of their config: Llama, Mistral, Qwen2 (and 2.5), Qwen3.

They are the language part of composed models and of families whose `text_config` may be any of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megavlm.errors import use_error
from megavlm.models.architecture import LanguageArchitecture
from megavlm.models.text_config import read_language
from megavlm.models.weight_map import Entry, direct, language_entries

# What transformers assumes when a config.json leaves a key out.
_COMMON: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}


@dataclass(frozen=True)
class Decoder:
    """How one kind of decoder differs from the others.

    Attributes:
        defaults: of keys that its config may leave out.
        qk_norm: each head's query and key are normalised.
        qkv_bias: their projections, and the value's, have biases.
    """

    defaults: Mapping[str, Any]
    qk_norm: bool = False
    qkv_bias: bool = False


DECODERS: dict[str, Decoder] = {
    "llama": Decoder(
        MappingProxyType(_COMMON | {"intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 2048})
    ),
    "mistral": Decoder(
        MappingProxyType(
            _COMMON
            | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 32000}
            | {"max_position_embeddings": 131072, "sliding_window": 4096}
        )
    ),
    "qwen2": Decoder(
        MappingProxyType(
            _COMMON
            | {"intermediate_size": 22016, "num_key_value_heads": 32, "vocab_size": 151936}
            | {"max_position_embeddings": 32768}
        ),
        qkv_bias=True,
    ),
    "qwen3": Decoder(
        MappingProxyType(
            _COMMON
            | {"intermediate_size": 22016, "num_key_value_heads": 32, "vocab_size": 151936}
            | {"max_position_embeddings": 32768, "head_dim": 128}
        ),
        qk_norm=True,
    ),
}

# Keys whose other values would need code that is not there.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
}


def read_decoder(text: Mapping[str, Any], tied: bool | None = None, where: str = "text_config") -> LanguageArchitecture:
    """Read a decoder's config, a `text_config` or the config.json of a text-only directory.

    Args:
        text: the config; without `model_type` it is a Llama.
        tied: whether embedding and output layer share their weights; None: as the config says.
        where: what an error calls the config.

    Raises:
        UseError: an unknown kind, or a knob of it that is not supported.
    """
    kind = text.get("model_type", "llama")
    if kind not in DECODERS:
        raise use_error(f"{where} model_type", repr(kind), f"one of {', '.join(DECODERS)}", "use such a language model")
    decoder = DECODERS[kind]
    text = {**decoder.defaults, **text}
    for key, allowed in _ONLY.items():
        if text.get(key, allowed[0]) not in allowed:
            raise use_error(f"{where} {key}", text[key], f"{allowed[0]}", "only that is supported")
    window = text.get("sliding_window") if kind == "mistral" else None
    if window is not None and window < text["max_position_embeddings"]:
        raise use_error(
            f"{where} sliding_window",
            window,
            f"null, or at least max_position_embeddings ({text['max_position_embeddings']})",
            "windowed attention of language models is not supported",
        )
    tied = bool(text.get("tie_word_embeddings", False)) if tied is None else tied
    return read_language(text, tied, {}, qk_norm=decoder.qk_norm, qkv_bias=decoder.qkv_bias)


def decoder_entries(language: LanguageArchitecture, prefix: str, head: str) -> list[Entry]:
    """The weight map of a whole language model.

    Args:
        language: the model.
        prefix: what the Hugging Face names of the decoder begin with, e.g. `language_model.model.`.
        head: name of the output layer's weight, which an untied model has.
    """
    entries = language_entries(
        language.num_layers,
        language.num_query_groups,
        language.head_dim,
        prefix,
        language.qk_norm,
        language.qkv_bias,
    )
    if not language.tied_embeddings:
        entries.append(direct("language.output_layer.weight", head))
    return entries

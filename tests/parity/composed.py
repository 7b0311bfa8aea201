"""Composed models put together from transformers' own modules, and their directories with random weights.

Shape suffixes: S tokens of a sample, I images, L patches of an image, D tower hidden size, H language hidden size.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Blip2QFormerConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.idefics.configuration_idefics import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2MLP, Idefics2PerceiverResampler

from tests.tiny import LLAVA_SPECIALS, LLAVA_TEMPLATE, VOCAB_SIZE, make_tokenizer
from tests.tiny_parts import CLIP_PROCESSOR

DECODERS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
CONNECTORS: dict[str, dict[str, Any]] = {
    "pixel_shuffle_mlp": {"scale_factor": 2},
    "perceiver": {
        "num_queries": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "gated_cross_attention": {
        "num_queries": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "cross_layer_interval": 3,
    },
    "qformer": {
        "num_queries": 5,
        "num_hidden_layers": 3,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 3,
        "cross_attention_frequency": 2,
    },
}
# A connector and a kind of language model each; tied embeddings in one.
COMPOSED = {"pixel_shuffle_mlp": ("llama", False), "perceiver": ("qwen3", True), "qformer": ("qwen2", False)}
COMPOSED["gated_cross_attention"] = ("qwen2", False)

_RENAMES = {
    "perceiver": {
        "perceiver_resampler.": "",
        "modality_projection.": "projection.",
        "self_attn.q_proj": "query",
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.o_proj": "output",
        "_proj.": ".",
        "input_latents_norm": "latents_norm",
        "input_context_norm": "context_norm",
        "post_attention_layernorm": "mlp_norm",
    },
    "gated_cross_attention": {
        "gated_layers": "GATED_LAYERS",
        "perceiver_resampler.": "",
        "modality_projection.": "projection.",
        "cross_attn.": "",
        "self_attn.q_proj": "query",
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.o_proj": "output",
        "q_proj": "query",
        "k_proj": "key",
        "v_proj": "value",
        "o_proj": "output",
        "_proj.": ".",
        "input_latents_norm": "latents_norm",
        "input_context_norm": "context_norm",
        "input_layernorm": "input_norm",
        "post_attention_layernorm": "mlp_norm",
        "alpha_cross_attn": "attention_gate",
        "alpha_dense": "mlp_gate",
        "GATED_LAYERS": "gated_layers",
    },
    "qformer": {
        "query_tokens": "queries",
        "qformer.encoder.layer.": "layers.",
        "qformer.layernorm": "norm",
        "language_projection": "projection",
        "attention.attention.": "attention.",
        "crossattention": "cross_attention",
        "attention.output.dense": "attention.output",
        "attention.output.LayerNorm": "attention.norm",
        "intermediate_query.dense": "mlp_fc1",
        "output_query.dense": "mlp_fc2",
        "output_query.LayerNorm": "mlp_norm",
    },
    "pixel_shuffle_mlp": {"0.": "mlp.norm.", "1.": "mlp.linear_fc1.", "3.": "mlp.linear_fc2."},
}


class Perceiver(nn.Module):
    def __init__(self, keys: dict[str, Any], tower_size: int, text: PretrainedConfig) -> None:
        super().__init__()
        size = text.hidden_size
        self.num_queries = keys["num_queries"]
        self.modality_projection = Idefics2MLP(tower_size, text.intermediate_size, size, "silu")
        config = Idefics2PerceiverConfig(
            hidden_size=size,
            resampler_n_latents=keys["num_queries"],
            resampler_depth=keys["num_hidden_layers"],
            resampler_n_heads=keys["num_attention_heads"],
            resampler_head_dim=keys["head_dim"],
            num_key_value_heads=keys["num_key_value_heads"],
            attn_implementation="eager",
        )
        self.perceiver_resampler = Idefics2PerceiverResampler(config)
        nn.init.normal_(self.perceiver_resampler.latents)  # all alike as transformers leaves them

    def forward(self, hidden_ILD: torch.Tensor) -> torch.Tensor:
        context = self.modality_projection(hidden_ILD)
        return self.perceiver_resampler(context, torch.ones(context.shape[:2]))


class QFormer(nn.Module):
    def __init__(self, keys: dict[str, Any], tower_size: int, text: PretrainedConfig) -> None:
        super().__init__()
        config = Blip2QFormerConfig(
            **{key: value for key, value in keys.items() if key != "num_queries"},
            encoder_hidden_size=tower_size,
            attention_probs_dropout_prob=0.0,
            hidden_dropout_prob=0.0,
            attn_implementation="eager",
        )
        self.query_tokens = nn.Parameter(torch.randn(keys["num_queries"], keys["hidden_size"]))
        self.qformer = Blip2QFormerModel(config)
        self.language_projection = nn.Linear(keys["hidden_size"], text.hidden_size)

    def forward(self, hidden_ILD: torch.Tensor) -> torch.Tensor:
        queries = self.query_tokens.expand(len(hidden_ILD), -1, -1)
        return self.language_projection(self.qformer(queries, encoder_hidden_states=hidden_ILD).last_hidden_state)


class PixelShuffle(nn.Sequential):
    def __init__(self, keys: dict[str, Any], tower_size: int, text: PretrainedConfig) -> None:
        merged = tower_size * keys["scale_factor"] ** 2
        size = text.hidden_size
        super().__init__(nn.LayerNorm(merged), nn.Linear(merged, size), nn.GELU(), nn.Linear(size, size))
        self.factor = keys["scale_factor"]

    def forward(self, hidden_ILD: torch.Tensor) -> torch.Tensor:
        images, patches, size = hidden_ILD.shape
        side = int(patches**0.5)
        squares = hidden_ILD.view(images, side, side, size).permute(0, 3, 1, 2)
        # torch's own pixel_unshuffle puts the channels outside; they come inside here
        merged = nn.functional.pixel_unshuffle(squares, self.factor).unflatten(1, (size, self.factor**2))
        return super().forward(merged.permute(0, 3, 4, 2, 1).flatten(3).flatten(1, 2))


class Gated(Perceiver):
    """A perceiver, and Idefics' layers in front of some of the decoder's."""

    def __init__(self, keys: dict[str, Any], tower_size: int, text: PretrainedConfig) -> None:
        super().__init__(keys, tower_size, text)
        self.interval = keys["cross_layer_interval"]
        config = IdeficsConfig(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_attention_heads=text.num_attention_heads,
            rms_norm_eps=text.rms_norm_eps,
            vision_config={"embed_dim": text.hidden_size},
            qk_layer_norms=False,
            alpha_type="float",
            dropout=0.0,
            attn_implementation="eager",
        )
        config._attn_implementation = "eager"
        numbers = range(0, text.num_hidden_layers, self.interval)
        self.gated_layers = nn.ModuleDict({str(n): IdeficsGatedCrossAttentionLayer(config) for n in numbers})
        for layer in self.gated_layers.values():
            nn.init.constant_(layer.alpha_cross_attn, 0.7)
            nn.init.constant_(layer.alpha_dense, -0.4)

    def attach(self, decoder: nn.Module, is_image_S: torch.Tensor, features_IQH: torch.Tensor | None) -> list[Any]:
        """Hooks on the decoder's layers; they are to be removed after."""
        seen_S = (is_image_S.cumsum(0) - 1) // self.num_queries
        features_1VH = torch.zeros(1, 1, 64) if features_IQH is None else features_IQH.flatten(0, 1)[None]
        image_V = torch.arange(features_1VH.shape[1]) // self.num_queries
        mask_SV = torch.where(seen_S[:, None] == image_V, 0.0, torch.finfo(torch.float32).min)
        handles = []
        for number, layer in self.gated_layers.items():

            def read(_module: Any, args: tuple[Any, ...], layer: nn.Module = layer) -> tuple[Any, ...]:
                hidden = layer(
                    args[0],
                    image_hidden_states=features_1VH,
                    image_attention_mask=mask_SV[None, None],
                    cross_attention_gate=(seen_S >= 0).float()[None],
                )
                return (hidden, *args[1:])

            handles.append(decoder.layers[int(number)].register_forward_pre_hook(read))
        return handles


MODULES: dict[str, type[nn.Module]] = {
    "gated_cross_attention": Gated,
    "perceiver": Perceiver,
    "qformer": QFormer,
    "pixel_shuffle_mlp": PixelShuffle,
}


class ComposedReference(nn.Module):
    """A CLIP tower, a connector and a causal language model, called as transformers' vision-language models are."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        decoder, tied = COMPOSED[kind]
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=28,
            patch_size=7,
        )
        text = DECODERS[decoder](
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=2048,
            tie_word_embeddings=tied,
        )
        self.kind = kind
        self.vision_tower = CLIPVisionModel._from_config(vision, attn_implementation="eager")
        self.language_model = AutoModelForCausalLM.from_config(text, attn_implementation="eager")
        self.connector = MODULES[kind](CONNECTORS[kind], vision.hidden_size, text)
        self.config = SimpleNamespace(
            model_type="megavlm",
            image_token_id=3,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
        self.dtype = torch.float32
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                elif not name.startswith("language_model"):
                    # so that activations keep their size, and mistakes show
                    parameter.div_(parameter.std() * parameter[0].numel() ** 0.5)
        self.train(False)

    def named_parameters(self, *arguments: Any, **keys: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """By the names of a composed directory."""
        for name, parameter in super().named_parameters(*arguments, **keys):
            if name.startswith("connector."):
                for theirs, ours in _RENAMES[self.kind].items():
                    name = name.replace(theirs, ours, 1)
            yield name, parameter

    def get_image_features(self, pixel_values: torch.Tensor) -> Any:
        hiddens = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        features = self.connector(hiddens[self.config.vision_feature_layer][:, 1:])
        return SimpleNamespace(pooler_output=features, hidden_states=hiddens)

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None) -> Any:
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        if isinstance(self.connector, Gated):
            features = None if pixel_values is None else self.get_image_features(pixel_values).pooler_output
            handles = self.connector.attach(
                self.language_model.model, input_ids[0] == self.config.image_token_id, features
            )
            output = self.language_model(inputs_embeds=embeddings)
            for handle in handles:
                handle.remove()
            return output
        if pixel_values is not None:
            features = self.get_image_features(pixel_values).pooler_output.flatten(0, 1)
            places = (input_ids == self.config.image_token_id)[..., None].expand_as(embeddings)
            embeddings = embeddings.masked_scatter(places, features)
        return self.language_model(inputs_embeds=embeddings)

    def write(self, out_dir: Path) -> Path:
        """Write the directory, with the tokenizer, template and image processor of a LLaVA."""
        config = {
            "model_type": "megavlm",
            "image_token_id": self.config.image_token_id,
            "vision_feature_layer": self.config.vision_feature_layer,
            "vision_config": self.vision_tower.config.to_dict(),
            "text_config": self.language_model.config.to_dict(),
            "connector_config": {"type": self.kind, **CONNECTORS[self.kind]},
        }
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / "config.json").write_text(json.dumps(config, default=str))
        tensors = {name: parameter.detach().contiguous() for name, parameter in self.named_parameters()}
        save_file(tensors, out_dir / "model.safetensors", metadata={"format": "pt"})
        tokenizer = make_tokenizer(
            LLAVA_SPECIALS, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
        )
        tokenizer.save_pretrained(out_dir)
        (out_dir / "chat_template.jinja").write_text(LLAVA_TEMPLATE)
        (out_dir / "preprocessor_config.json").write_text(json.dumps(CLIP_PROCESSOR))
        return out_dir

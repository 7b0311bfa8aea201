"""Connectors with learned queries: an image becomes as many visual tokens as there are queries.

Perceiver resampler: Flamingo, Alayrac et al., arXiv 2204.14198, section 3.1.1, as Idefics2 has it (arXiv 2405.02246).
Q-Former: BLIP-2, Li et al., arXiv 2301.12597, its query half.

Both are small beside a vision tower: every tensor-parallel rank holds and runs them whole.

Shape suffixes: P patches of all images, I images, L patches of one image, D tower hidden size, Q queries, W width of
the resampler, V visual tokens (I * Q), H language hidden size.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megavlm.models.architecture import ConnectorArchitecture
from megavlm.models.norm import RMSNorm, plain_layer_norm


def attend(query_IQW: torch.Tensor, key_ILW: torch.Tensor, value_ILW: torch.Tensor, head_dim: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(head_dim)) v of every image, heads side by side in W; keys may have fewer heads."""

    def heads(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(-1, (-1, head_dim)).transpose(1, 2)

    query, key, value = heads(query_IQW), heads(key_ILW), heads(value_ILW)
    shared = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, enable_gqa=shared)
    return out.transpose(1, 2).flatten(2)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, input_size: int, middle_size: int, output_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = nn.Linear(input_size, middle_size, bias=False, dtype=dtype)
        self.up = nn.Linear(input_size, middle_size, bias=False, dtype=dtype)
        self.down = nn.Linear(middle_size, output_size, bias=False, dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., input] to [..., output]."""
        output: torch.Tensor = self.down(F.silu(self.gate(hidden)) * self.up(hidden))
        return output


class PerceiverLayer(nn.Module):
    """Latents look at the image and at themselves; then an MLP four times as wide."""

    def __init__(self, connector: ConnectorArchitecture, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = connector.head_dim
        wide, narrow = connector.num_heads * self.head_dim, connector.num_key_value_heads * self.head_dim
        self.latents_norm = RMSNorm(size, eps=connector.norm_epsilon, dtype=dtype)
        self.context_norm = RMSNorm(size, eps=connector.norm_epsilon, dtype=dtype)
        self.query = nn.Linear(size, wide, bias=False, dtype=dtype)
        self.key = nn.Linear(size, narrow, bias=False, dtype=dtype)
        self.value = nn.Linear(size, narrow, bias=False, dtype=dtype)
        self.output = nn.Linear(wide, size, bias=False, dtype=dtype)
        self.mlp_norm = RMSNorm(size, eps=connector.norm_epsilon, dtype=dtype)
        self.mlp = GatedMLP(size, 4 * size, size, dtype)

    def forward(self, latents_IQH: torch.Tensor, context_ILH: torch.Tensor) -> torch.Tensor:
        """[I, Q, H] to [I, Q, H]."""
        normed_IQH = self.latents_norm(latents_IQH)
        seen = torch.cat((self.context_norm(context_ILH), normed_IQH), dim=1)
        attended = attend(self.query(normed_IQH), self.key(seen), self.value(seen), self.head_dim)
        latents_IQH = latents_IQH + self.output(attended)
        output: torch.Tensor = latents_IQH + self.mlp(self.mlp_norm(latents_IQH))
        return output


class PerceiverResampler(MegatronModule):
    """Patches to the language model's width, then `depth` layers of latents that read them."""

    def __init__(
        self,
        config: TransformerConfig,
        connector: ConnectorArchitecture,
        sizes: tuple[int, int, int],
        num_patches: int,
    ) -> None:
        """Build it.

        Args:
            config: of the encoder.
            connector: what it is made of.
            sizes: tower hidden size, width of the MLP in front, language hidden size.
            num_patches: of an image.
        """
        super().__init__(config=config)
        dtype, (tower_size, middle_size, size) = config.params_dtype, sizes
        self.num_patches = num_patches
        self.projection = GatedMLP(tower_size, middle_size, size, dtype)
        self.latents = nn.Parameter(torch.ones(connector.num_queries, size, dtype=dtype))
        self.layers = nn.ModuleList([PerceiverLayer(connector, size, dtype) for _ in range(connector.depth)])
        self.norm = RMSNorm(size, eps=connector.norm_epsilon, dtype=dtype)

    def forward(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """[P, D] to [V, H]."""
        context_ILH = self.projection(hidden_PD).unflatten(0, (-1, self.num_patches))
        latents_IQH = self.latents.expand(len(context_ILH), -1, -1)
        for layer in self.layers:
            latents_IQH = layer(latents_IQH, context_ILH)
        output: torch.Tensor = self.norm(latents_IQH).flatten(0, 1)
        return output


class PostNormAttention(nn.Module):
    """BERT's attention: the norm comes behind the residual connection."""

    def __init__(self, size: int, context_size: int, head_dim: int, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Linear(size, size, dtype=dtype)
        self.key = nn.Linear(context_size, size, dtype=dtype)
        self.value = nn.Linear(context_size, size, dtype=dtype)
        self.output = nn.Linear(size, size, dtype=dtype)
        self.norm = plain_layer_norm(size, epsilon, dtype)

    def forward(self, hidden_IQW: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """[I, Q, W] reads [I, L, its size]."""
        attended = attend(self.query(hidden_IQW), self.key(context), self.value(context), self.head_dim)
        output: torch.Tensor = self.norm(self.output(attended) + hidden_IQW)
        return output


class QFormerLayer(nn.Module):
    """Queries read each other, in some layers the image too, and pass an MLP."""

    def __init__(self, connector: ConnectorArchitecture, tower_size: int, reads: bool, dtype: torch.dtype) -> None:
        super().__init__()
        size, epsilon = connector.hidden_size, connector.norm_epsilon
        head_dim = size // connector.num_heads
        self.attention = PostNormAttention(size, size, head_dim, epsilon, dtype)
        self.reads = reads
        if reads:
            self.cross_attention = PostNormAttention(size, tower_size, head_dim, epsilon, dtype)
        self.mlp_fc1 = nn.Linear(size, connector.ffn_hidden_size, dtype=dtype)
        self.mlp_fc2 = nn.Linear(connector.ffn_hidden_size, size, dtype=dtype)
        self.mlp_norm = plain_layer_norm(size, epsilon, dtype)

    def forward(self, hidden_IQW: torch.Tensor, context_ILD: torch.Tensor) -> torch.Tensor:
        """[I, Q, W] to [I, Q, W]."""
        hidden_IQW = self.attention(hidden_IQW, hidden_IQW)
        if self.reads:
            hidden_IQW = self.cross_attention(hidden_IQW, context_ILD)
        output: torch.Tensor = self.mlp_norm(self.mlp_fc2(F.gelu(self.mlp_fc1(hidden_IQW))) + hidden_IQW)
        return output


class QFormer(MegatronModule):
    """Learned queries through a small BERT that reads the image in every `cross_attention_frequency`-th layer."""

    def __init__(
        self,
        config: TransformerConfig,
        connector: ConnectorArchitecture,
        tower_size: int,
        output_size: int,
        num_patches: int,
    ) -> None:
        """Build it.

        Args:
            config: of the encoder.
            connector: what it is made of.
            tower_size: hidden size of the tower.
            output_size: hidden size of the language model.
            num_patches: of an image.
        """
        super().__init__(config=config)
        dtype, size = config.params_dtype, connector.hidden_size
        self.num_patches = num_patches
        self.queries = nn.Parameter(torch.zeros(connector.num_queries, size, dtype=dtype))
        self.norm = plain_layer_norm(size, connector.norm_epsilon, dtype)
        frequency = connector.cross_attention_frequency
        self.layers = nn.ModuleList(
            [QFormerLayer(connector, tower_size, number % frequency == 0, dtype) for number in range(connector.depth)]
        )
        self.projection = nn.Linear(size, output_size, dtype=dtype)

    def forward(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """[P, D] to [V, H]."""
        context_ILD = hidden_PD.unflatten(0, (-1, self.num_patches))
        hidden_IQW = self.norm(self.queries).expand(len(context_ILD), -1, -1)
        for layer in self.layers:
            hidden_IQW = layer(hidden_IQW, context_ILD)
        output: torch.Tensor = self.projection(hidden_IQW).flatten(0, 1)
        return output

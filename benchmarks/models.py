"""What samples cost for three sizes of vision-language model: forward FLOPs of matrix multiplications."""

from dataclasses import dataclass

import numpy as np

from benchmarks.lengths import PACK_TOKENS, Sample
from megavlm.data.balance import SampleCosts


@dataclass(frozen=True)
class Vit:
    """Vision tower with full attention within an image (or tile)."""

    num_layers: int
    width: int
    mlp: int
    gated: bool

    def flops(self, num_patches: int) -> float:
        """Forward of one image."""
        linear = 2 * (4 * self.width**2 + (3 if self.gated else 2) * self.width * self.mlp)
        return self.num_layers * num_patches * (linear + 4 * num_patches * self.width)


@dataclass(frozen=True)
class Llm:
    """Language model with grouped-query attention and a gated MLP."""

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    mlp: int
    vocabulary: int

    def layer_flops(self, lengths: list[int]) -> float:
        """Forward of one layer on a pack of causal sequences."""
        head_width = self.width // self.num_heads
        linear = 2 * (2 * self.width**2 + 2 * self.width * self.num_kv_heads * head_width + 3 * self.width * self.mlp)
        return linear * sum(lengths) + 2 * self.width * sum(length**2 for length in lengths)

    def head_flops(self, lengths: list[int]) -> float:
        """Forward of the output layer."""
        return 2 * self.width * self.vocabulary * sum(lengths)

    def flops(self, lengths: list[int]) -> float:
        """Forward of all layers and the head."""
        return self.num_layers * self.layer_flops(lengths) + self.head_flops(lengths)


@dataclass(frozen=True)
class Model:
    """Encoder and language model, and the number of microbatches that the step is measured with."""

    vit: Vit
    llm: Llm
    num_microbatches: int
    required: float
    """What the bubble placement must reach with one model chunk a rank."""
    aim: float


VIT_600M = Vit(32, 1280, 3420, True)
MODELS: dict[str, Model] = {
    "ViT0.6B+7B": Model(VIT_600M, Llm(28, 3584, 28, 4, 18944, 152064), 16, 1.08, 1.03),
    "ViT0.6B+32B": Model(VIT_600M, Llm(64, 5120, 40, 8, 27648, 152064), 32, 1.09, 1.05),
    "ViT6B+20B": Model(Vit(45, 3200, 12800, False), Llm(48, 6144, 48, 8, 16384, 92553), 16, 1.07, 1.03),
}


@dataclass(frozen=True)
class Pack:
    """A microbatch as forward FLOPs."""

    images: tuple[float, ...]
    layer: float
    head: float

    @property
    def encoder(self) -> float:
        """Of all images."""
        return sum(self.images)


def pack_costs(samples: list[Sample], model: Model) -> Pack:
    """The costs of samples in one pack."""
    lengths = [sample.num_tokens for sample in samples]
    images = tuple(model.vit.flops(patches) for sample in samples for patches in sample.image_patches)
    return Pack(images, model.llm.layer_flops(lengths), model.llm.head_flops(lengths))


def total_flops(pack: Pack, model: Model) -> float:
    """Forward of encoder, layers and head."""
    return pack.encoder + model.llm.num_layers * pack.layer + pack.head


def sample_costs(samples: list[Sample], model: Model) -> SampleCosts:
    """The costs of samples one by one."""
    return SampleCosts(
        np.array([sample.num_tokens for sample in samples]),
        np.array(
            [sum(model.vit.flops(patches) for patches in sample.image_patches) for sample in samples], dtype=float
        ),
        np.array([model.llm.flops([sample.num_tokens]) for sample in samples]),
        PACK_TOKENS,
    )

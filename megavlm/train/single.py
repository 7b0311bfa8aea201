"""A whole model in this one process: for conversion and for looking at a checkpoint."""

from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.checkpoint.hf_io import HFDirectory
from megavlm.config.schema import ModelConfig, ParallelConfig
from megavlm.data.sample import Batch
from megavlm.models.build import build_encoder, build_language_chunks, transformer_config, unwrap
from megavlm.models.chunk import LanguageChunk
from megavlm.models.encoder import VisionEncoder
from megavlm.parallel.groups import Groups, initialize, join_world
from megavlm.platform.seeds import seed_everything
from megavlm.train.pipeline_work import run_chunk


@dataclass(frozen=True)
class SingleModel:
    """A whole model, its weights not yet loaded, in evaluation mode."""

    encoder: VisionEncoder
    language: LanguageChunk
    groups: Groups
    config: TransformerConfig

    @property
    def parts(self) -> tuple[LanguageChunk, VisionEncoder]:
        """What it is made of."""
        return self.language, self.encoder

    def logits(self, batch: Batch, device: torch.device) -> torch.Tensor:
        """Forward pass of a packed row with its pixels: [T, vocabulary]."""
        features_VKH = None
        if len(batch.grid_thw_N3):
            features_VKH = self.encoder(batch.patches_PC.to(device), batch.grid_thw_N3.to(device))
        logits: torch.Tensor = run_chunk(self.language, batch, features_VKH, device)
        return logits


def build_single(directory: HFDirectory, precision: str, timeout_s: int = 600) -> SingleModel:
    """Build the model of a directory; initialises a world of one.

    Args:
        directory: says what to build.
        precision: fp32 or bf16.
        timeout_s: of collectives.
    """
    join_world(timeout_s)
    parallel = ParallelConfig()
    groups = initialize(parallel)
    seed_everything(0)
    config = transformer_config(directory.architecture, ModelConfig(), parallel, precision)
    with torch.no_grad():
        (chunk,) = build_language_chunks(directory.architecture, config, ModelConfig(), groups)
        encoder = build_encoder(directory.family, directory.architecture, config, "torch", groups)
    language = unwrap(chunk)
    assert encoder is not None and isinstance(language, LanguageChunk)
    for part in (encoder, language):
        part.eval()
    return SingleModel(encoder, language, groups, config)

"""A whole model in this one process: for conversion and for looking at a checkpoint."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.checkpoint.hf_io import HFDirectory
from megavlm.config.schema import ModelConfig, ParallelConfig
from megavlm.models.build import build_chunks, transformer_config, unwrap
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.groups import Groups, initialize, join_world
from megavlm.platform.seeds import seed_everything


def build_single(
    directory: HFDirectory, precision: str, timeout_s: int = 600
) -> tuple[VisionLanguageModel, Groups, TransformerConfig]:
    """Build the model of a directory, weights not yet loaded, in eval mode; initialises a world of one.

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
        chunk = build_chunks(directory.family, directory.architecture, config, "torch", groups)[0]
    model = unwrap(chunk)
    model.eval()
    return model, groups, config

"""Noise on word embeddings in training (NEFTune), the same however rows are packed, cut or split over ranks.

Shape suffixes: T tokens of the whole packed row, N samples, H hidden size.
Source: Jain et al., arXiv 2310.05914, algorithm 1.
"""

import numpy as np
import torch


def embedding_noise(
    seeds_N: torch.Tensor,
    cu_seqlens: torch.Tensor,
    real_T: torch.Tensor,
    hidden_size: int,
    alpha: float,
    seed: int,
) -> torch.Tensor:
    """Uniform noise of at most alpha / sqrt(length * hidden size) on every real token: fp32 [T, H], on the CPU.

    A sample's noise comes from a generator of its own, so that it does not depend on what it is packed with.

    Args:
        seeds_N: int64, one for each sample of the row, which changes from step to step.
        cu_seqlens: sample borders; behind the samples there may be padding.
        real_T: bool, False on padding.
        hidden_size: H.
        alpha: how strong the noise is.
        seed: of the run.
    """
    noise_TH = torch.zeros(len(real_T), hidden_size)
    for sample_seed, start, end in zip(
        seeds_N.tolist(), cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=False
    ):
        length = int(real_T[start:end].sum())
        if length:
            generator = torch.Generator().manual_seed(_mixed(seed, sample_seed))
            drawn = torch.rand(length, hidden_size, generator=generator)
            noise_TH[start : start + length] = (2 * drawn - 1) * (alpha / (length * hidden_size) ** 0.5)
    return noise_TH


def _mixed(seed: int, sample_seed: int) -> int:
    """One seed of two, the same with every version of Python (whose own hash of a pair is not) and of numpy."""
    high, low = np.random.SeedSequence([seed, sample_seed]).generate_state(2).tolist()
    return (high << 31) ^ low

"""Rank-aware logging: rank 0 speaks, other ranks only warn."""

import logging
import os
import warnings

# Warnings that are true and of no use to a user of the CPU platform.
_QUIET = (
    "Transformer Engine and Apex are not installed",
    "transformer_engine",
    "Apex is not installed",
    "nvidia_resiliency_ext",
    "Triton",
)


def rank() -> int:
    """This process's global rank as torchrun tells it; 0 outside of torchrun."""
    return int(os.environ.get("RANK", "0"))


def configure(verbose: bool = False) -> None:
    """Set up the `megavlm` logger: INFO on rank 0, WARNING on the others, DEBUG everywhere when verbose."""
    level = logging.DEBUG if verbose else (logging.INFO if rank() == 0 else logging.WARNING)
    prefix = "" if rank() == 0 else f"[rank {rank()}] "
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger = logging.getLogger("megavlm")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
    if not verbose:
        logging.getLogger("megatron").setLevel(logging.ERROR)
        # What fails there is raised as well.
        logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async").setLevel(logging.CRITICAL)
        for text in _QUIET:
            warnings.filterwarnings("ignore", message=f".*{text}.*")
        warnings.filterwarnings("ignore", module=r"megatron\..*")
        warnings.filterwarnings("ignore", module=r"torch\.distributed\..*")

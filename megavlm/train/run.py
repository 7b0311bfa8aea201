"""One rank of a training run, from recipe to exit code."""

import contextlib
import logging
import sys
from collections.abc import Iterator

import torch.distributed as dist

from megavlm.config.schema import Recipe
from megavlm.platform.start import start

logger = logging.getLogger(__name__)


def run_training(recipe: Recipe) -> int:
    """Install the platform, join the world, train. Returns the process's exit code."""
    start()
    from megavlm.parallel import groups
    from megavlm.train.loop import layout_name, train
    from megavlm.train.state import build_state

    groups.join_world(recipe.train.distributed_timeout_s)
    with leaving_world():
        state = build_state(recipe)
        sizes = [(one.numel(), one.requires_grad) for model in state.models for one in model.parameters()]
        logger.info(
            "%s: %s on %d process(es), %s, %.2f M parameters on this rank, of which %.2f M learn, %d rows",
            recipe.name,
            state.directory.family.model_type,
            dist.get_world_size(),
            layout_name(state),
            sum(size for size, _ in sizes) / 1e6,
            sum(size for size, learns in sizes if learns) / 1e6,
            len(state.train_set),
        )
        train(state)
    return 0


@contextlib.contextmanager
def leaving_world() -> Iterator[None]:
    """Leave the process group in order when all went well; on an error leave at once, peers may be waiting in it."""
    yield
    sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()

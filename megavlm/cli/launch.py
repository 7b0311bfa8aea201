"""Start several processes of a command on this machine, as torchrun would, and report like one process."""

import sys
from collections.abc import Sequence


def launch(num_processes: int, words: Sequence[str]) -> int:
    """Run `megavlm WORDS` in so many processes; one that fails ends the others.

    Returns:
        0, or the exit code of the first process that failed (its message is on stderr already).
    """
    import logging
    import os
    import uuid

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The launcher reports a failed child with a page of text; the child has said what matters in one line.
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "megavlm", *words)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 1
    return 0

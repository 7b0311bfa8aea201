import os
import sys
import time
from collections.abc import Iterator

import pytest

from tests.pool import PoolKeeper, WorkerError, WorkerPool, WorkerTimeoutError, function_name


def add_ranks(offset: int) -> tuple[int, float]:
    import torch
    import torch.distributed as dist

    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return dist.get_rank(), value.item()


def fail_on_rank(bad_rank: int) -> None:
    import torch
    import torch.distributed as dist

    if dist.get_rank() == bad_rank:
        print("a word before the end", file=sys.stderr)
        raise ValueError("the reason")
    dist.all_reduce(torch.zeros(1))  # hangs: the failing rank never comes


def die_on_rank(bad_rank: int) -> None:
    import torch.distributed as dist

    if dist.get_rank() == bad_rank:
        os._exit(3)


def sleep_on_rank(slow_rank: int) -> None:
    import torch.distributed as dist

    if dist.get_rank() == slow_rank:
        time.sleep(600)


def make_groups_and_forget() -> int:
    import torch.distributed as dist

    group = dist.new_group([0, 1])
    assert dist.get_world_size(group) == 2
    return dist.distributed_c10d._world.group_count  # how many groups this world has made so far


def describe_process() -> tuple[int, bool, int, str, bool]:
    import torch

    from megavlm.platform import cpu

    return os.getpid(), cpu.install(), torch.get_num_threads(), os.environ["RANK"], "megatron.core" in sys.modules


def return_unpicklable() -> object:
    return lambda: None


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    pair = WorkerPool(2)
    yield pair
    pair.close()


def test_ranks_reduce_together_and_processes_stay(pool: WorkerPool) -> None:
    assert pool.run(add_ranks, offset=1) == [(0, 3.0), (1, 3.0)]
    first = pool.process_ids
    assert pool.run("tests.unit.test_pool:add_ranks", offset=2) == [(0, 5.0), (1, 5.0)]
    assert pool.process_ids == first


def test_each_case_has_a_fresh_world(pool: WorkerPool) -> None:
    counts = [pool.run(make_groups_and_forget) for _ in range(3)]
    assert counts[0] == counts[1] == counts[2]


def test_workers_hold_the_cpu_adapter_and_pytest_does_not(pool: WorkerPool) -> None:
    rows = pool.run(describe_process)
    assert [row[0] for row in rows] == pool.process_ids
    assert [row[1:] for row in rows] == [(True, 1, "0", True), (True, 1, "1", True)]
    adapter = sys.modules.get("megavlm.platform.cpu")
    assert adapter is None or not adapter._state["installed"]


def test_a_failing_rank_is_shown_and_the_pool_recovers(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError) as caught:
        pool.run(fail_on_rank, bad_rank=1)
    assert set(caught.value.tracebacks) == {1}
    text = str(caught.value)
    assert "ValueError: the reason" in text and "in fail_on_rank" in text
    assert "a word before the end" in text
    assert pool.process_ids == []
    assert pool.run(add_ranks, offset=0) == [(0, 1.0), (1, 1.0)]


def test_a_dead_rank_is_shown_and_the_pool_recovers(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="exit code 3"):
        pool.run(die_on_rank, bad_rank=0)
    assert pool.run(add_ranks, offset=0) == [(0, 1.0), (1, 1.0)]


def test_a_late_rank_is_killed_with_its_stack_and_the_pool_recovers(pool: WorkerPool) -> None:
    pool.run(add_ranks, offset=0)
    late_process = pool.process_ids[1]
    with pytest.raises(WorkerTimeoutError, match=r"no answer from rank \[1\] within 1 s") as caught:
        pool.run(sleep_on_rank, timeout_s=1, slow_rank=1)
    assert "in sleep_on_rank" in str(caught.value)
    with pytest.raises(ProcessLookupError):
        os.kill(late_process, 0)
    assert pool.run(add_ranks, offset=0) == [(0, 1.0), (1, 1.0)]


def test_a_result_that_cannot_be_pickled_is_an_error(workers: PoolKeeper) -> None:
    with pytest.raises(WorkerError, match="pickle"):
        workers(1).run(return_unpicklable)


def test_a_world_of_one_is_a_process_of_its_own(workers: PoolKeeper) -> None:
    [row] = workers(1).run(describe_process)
    assert row[0] != os.getpid()
    assert workers(1).run(add_ranks, offset=4) == [(0, 4.0)]


def test_the_longest_unused_pools_make_room() -> None:
    keeper = PoolKeeper(max_processes=6)
    one, two, four = keeper(1), keeper(2), keeper(4)
    assert keeper(4) is four and keeper(2) is two
    assert keeper(1) is not one  # had to go for the pool of four
    assert keeper(2) is two
    assert keeper(4) is not four


def test_a_nested_function_is_refused() -> None:
    def nested() -> None: ...

    with pytest.raises(AssertionError, match="top of its module"):
        function_name(nested)

import dataclasses
import gc
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch
from torch._utils import ExceptionWrapper

from megavlm.data.encode import SampleEncoder
from megavlm.data.image_patches import normalised
from megavlm.data.images import read_image_spec
from megavlm.data.index_files import build_index
from megavlm.data.loader import LEAST_SHARED_BYTES, BatchLoader, Dataset, _checked, evaluation_rows
from megavlm.data.pixels import load_image_patches
from megavlm.data.plan import GlobalBatchPlan
from megavlm.data.rows import Rows
from megavlm.data.sample import EncodedSample, MicrobatchOrder
from megavlm.data.tokens import Tokenizer
from megavlm.errors import RunError, UseError
from tests.unit.data.conftest import QWEN_INPUTS, draw_image, write_jsonl

NUM_ROWS = 11


@pytest.fixture(scope="module")
def encoder(qwen_dir):
    spec = read_image_spec(qwen_dir, QWEN_INPUTS)
    return SampleEncoder(QWEN_INPUTS, spec, Tokenizer(qwen_dir, QWEN_INPUTS.image_token_id), max_length=200)


def make_rows(folder, num_rows=NUM_ROWS):
    """Rows with none, one or two images of different sizes, and answers of different lengths."""
    rows = []
    for number in range(num_rows):
        names = [f"{number}_{which}.png" for which in range(number % 3)]
        for which, name in enumerate(names):
            draw_image(folder / name, 40 + 16 * number, 48 + 30 * which, seed=number)
        question = {"role": "user", "content": "<image>" * len(names) + f"what is {number}?"}
        answer = {"role": "assistant", "content": "red " * number + "square"}
        rows.append({"messages": [question, answer], "images": names})
    return write_jsonl(folder / "rows.jsonl", rows)


@pytest.fixture
def rows_path(tmp_path):
    return make_rows(tmp_path)


def prepared(path, encoder, **kwargs):
    dataset = Dataset(Rows.open([str(path)]), encoder, **kwargs)
    return dataset, dataset.prepare()


def orders_of(dataset, rows, with_images=True):
    """Orders for rows with all their own images, as (sample indices, filler), or for the rows alone."""
    return [
        MicrobatchOrder(
            indices,
            tuple((index, number) for index in indices for number in range(len(dataset.grids_each[index])))
            if with_images
            else (),
            filler,
        )
        for indices, filler in rows
    ]


def make_loader(dataset, dp_rank=0, dp_size=1, num_workers=0, micro_batch_size=2, with_images=True):
    plan = GlobalBatchPlan(len(dataset), 5, 8, micro_batch_size, dp_size)

    def of_step(step):
        return orders_of(dataset, [(row, False) for row in plan.microbatches(step, dp_rank)], with_images)

    return BatchLoader(dataset, of_step, sample_multiple=4, total_multiple=8, num_workers=num_workers)


def eval_batches(loader, dataset, dp_rank=0, dp_size=1, micro_batch_size=2, max_rounds=0):
    rows = evaluation_rows(dataset, micro_batch_size, dp_size, max_rounds=max_rounds)[dp_rank]
    return loader.eval_batches(dataset, orders_of(dataset, rows))


def assert_same(first, second):
    assert torch.equal(first.pixels.values_B, second.pixels.values_B) and first.pixels.runs == second.pixels.runs
    assert_same_rows(first.batch, second.batch)


def assert_same_rows(first, second):
    for field in dataclasses.fields(first):
        left, right = (getattr(batch, field.name) for batch in (first, second))
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, field.name


def test_batches_follow_the_plan_and_hold_the_pixels(rows_path, encoder):
    dataset, report = prepared(rows_path, encoder)
    assert (report.num_rows, report.num_kept, report.dropped) == (NUM_ROWS, NUM_ROWS, {})
    assert report.num_tokens == sum(len(dataset.encoded(index).tokens_S) for index in range(NUM_ROWS))
    plan = GlobalBatchPlan(len(dataset), 5, 8, 2, 1)
    batches = list(make_loader(dataset).batches(1))
    expected = [tuple(dataset.sample(index).sample_id for index in indices) for indices in plan.microbatches(1, 0)]
    assert [one.batch.sample_ids for one in batches] == expected
    for one in batches:
        batch = one.batch
        assert len(batch.tokens_T) % 8 == 0
        merged = (batch.grid_thw_N3.prod(1) // 4).sum()
        assert (batch.tokens_T == QWEN_INPUTS.image_token_id).sum() == merged
        assert batch.patches_PC.shape == (0, QWEN_INPUTS.patch_channels)
        assert normalised(one.pixels).shape == (batch.grid_thw_N3.prod(1).sum(), QWEN_INPUTS.patch_channels)
        assert batch.loss_weights_T.sum() > 0


def test_data_ranks_share_the_global_batch(rows_path, encoder):
    dataset, _ = prepared(rows_path, encoder)
    alone = [batch for step in (0, 1) for batch in make_loader(dataset).batches(step)]
    shared = [
        batch
        for step in (0, 1)
        for pair in zip(*(make_loader(dataset, rank, 2).batches(step) for rank in (0, 1)), strict=True)
        for batch in pair
    ]
    assert len(alone) == len(shared) == 8
    for first, second in zip(alone, shared, strict=True):
        assert_same(first, second)


def test_cache_makes_no_difference(rows_path, encoder):
    cached, _ = prepared(rows_path, encoder)
    length = int(cached.num_tokens_each[3])
    not_cached, _ = prepared(rows_path, encoder, cached_tokens=length)
    assert not_cached.encoded(3) is not_cached.encoded(3)  # takes all the room there is
    assert not_cached.encoded(4) is not not_cached.encoded(4)
    assert cached.encoded(3) is cached.encoded(3)
    for first, second in zip(make_loader(cached).batches(0), make_loader(not_cached).batches(0), strict=True):
        assert_same(first, second)


def test_rows_that_do_not_fit_are_dropped_and_told(rows_path, encoder, tmp_path):
    lengths = prepared(rows_path, encoder)[0].num_tokens_each
    limit = sorted(lengths)[-3] - 1  # the three longest do not fit
    tight = SampleEncoder(QWEN_INPUTS, encoder.image_spec, encoder.tokenizer, max_length=int(limit))
    muted = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "loss": False}]}
    with open(rows_path, "a") as file:
        write_jsonl(tmp_path / "muted.jsonl", [muted])
        file.write((tmp_path / "muted.jsonl").read_text())
    dataset, report = prepared(rows_path, tight)
    too_long = tuple(f"{rows_path}:{row + 1}" for row, length in enumerate(lengths) if length > limit)
    assert len(too_long) == 3
    assert report.dropped == {"too_long": too_long, "nothing_to_learn": (f"{rows_path}:{NUM_ROWS + 1}",)}
    assert len(dataset) == report.num_kept == NUM_ROWS - 3
    kept = {dataset.sample(index).sample_id for index in range(len(dataset))}
    assert not kept & set(too_long)
    assert all(dataset.encoded(i).sample_id == dataset.sample(i).sample_id for i in range(len(dataset)))
    assert max(dataset.num_tokens_each) <= limit


def test_no_row_left_is_refused(rows_path, encoder):
    none = SampleEncoder(QWEN_INPUTS, encoder.image_spec, encoder.tokenizer, max_length=3)
    with pytest.raises(UseError, match=r"no row left of 11 \(11 too_long"):
        prepared(rows_path, none)


def test_broken_row_stops_the_preparation(rows_path, encoder, tmp_path):
    (tmp_path / "4_0.png").write_bytes(b"")
    with pytest.raises(UseError, match=r"rows\.jsonl:5: .*4_0\.png: got unreadable image"):
        prepared(rows_path, encoder)


def break_pixels(path):
    """Cut an image behind its header: it is found out only when it is decoded."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def test_image_that_breaks_behind_its_header_is_named(rows_path, encoder, tmp_path):
    dataset, _ = prepared(rows_path, encoder)
    break_pixels(tmp_path / "4_0.png")
    with pytest.raises(UseError, match=r"rows\.jsonl:5: .*4_0\.png: got unreadable image"):
        for step in range(2):
            list(make_loader(dataset).batches(step))


@pytest.mark.parametrize("size", [(250, 250), (48, 104)])  # the second has as many patches as before, on end
def test_image_that_changed_its_size_is_named(rows_path, encoder, tmp_path, size):
    encoded_before, _ = prepared(rows_path, encoder)
    assert encoded_before.encoded(4).grids_thw == ((1, 4, 6),)
    not_encoded, _ = prepared(rows_path, encoder)
    draw_image(tmp_path / "4_0.png", *size)
    for dataset in (encoded_before, not_encoded):
        with pytest.raises(UseError, match=r"rows\.jsonl:5: .*4_0\.png: its size: got a grid .* expected \(1, 4, 6\)"):
            for step in range(2):
                list(make_loader(dataset).batches(step))


def test_row_that_changed_is_named(rows_path, encoder):
    dataset, _ = prepared(rows_path, encoder)
    before = rows_path.read_text()
    assert before.count("what is 4?") == 1
    rows_path.write_text(before.replace("what is 4?", "????????? "))  # of the same size, so that it is found
    with pytest.raises(UseError, match=r"rows\.jsonl:5: got \d+ tokens and grids .*, as the index says"):
        for step in range(2):
            list(make_loader(dataset).batches(step))


def test_rank_that_encodes_no_image_reads_none(rows_path, encoder, tmp_path):
    dataset, _ = prepared(rows_path, encoder)
    whole = list(make_loader(dataset).batches(0))
    not_encoded, _ = prepared(rows_path, encoder)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"")
    for known in (dataset, not_encoded):
        blind = make_loader(known, with_images=False)
        for first, second in zip(whole, blind.batches(0), strict=True):
            assert normalised(second.pixels).shape == (0, QWEN_INPUTS.patch_channels)
            assert_same_rows(first.batch, second.batch)


def test_images_of_other_rows_come_in_the_order_that_they_were_asked_for(rows_path, encoder):
    dataset, _ = prepared(rows_path, encoder)
    wanted = ((5, 1), (1, 0), (5, 0))
    loader = BatchLoader(dataset, lambda _step: [MicrobatchOrder((3,), wanted)], 4, 8)
    (one,) = loader.batches(0)
    expected = [load_image_patches(dataset.encoded(index), number, encoder) for index, number in wanted]
    assert torch.equal(normalised(one.pixels), torch.cat(expected))
    assert one.batch.sample_ids == (dataset.sample(3).sample_id,)


def test_encoder_travels_to_another_process(rows_path, encoder):
    sample = Rows.open([str(rows_path)])[5]
    travelled = pickle.loads(pickle.dumps(encoder))
    for field in dataclasses.fields(EncodedSample):
        left, right = (getattr(each.encode(sample), field.name) for each in (encoder, travelled))
        assert np.array_equal(left, right), field.name


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 2), (2, 2), (4, 2), (2, 1), (4, 1)])
def test_evaluation_walks_every_row_once_and_keeps_ranks_level(rows_path, encoder, dp_size, micro_batch_size):
    dataset, _ = prepared(rows_path, encoder)
    by_rank = [
        [
            one.batch
            for one in eval_batches(make_loader(dataset), dataset, rank, dp_size, micro_batch_size=micro_batch_size)
        ]
        for rank in range(dp_size)
    ]
    assert len({len(batches) for batches in by_rank}) == 1
    in_order = [batch for rounds in zip(*by_rank, strict=True) for batch in rounds]
    real = [batch for batch in in_order if batch.loss_weights_T.any()]
    seen = [sample_id for batch in real for sample_id in batch.sample_ids]
    assert seen == [dataset.sample(index).sample_id for index in range(NUM_ROWS)]
    # Fillers come last, are real rows to compute on, and weigh nothing.
    assert in_order[len(real) :] == [batch for batch in in_order if not batch.loss_weights_T.any()]
    assert all(batch.num_real_tokens > 0 for batch in in_order)


def test_evaluation_can_be_bounded(rows_path, encoder):
    dataset, _ = prepared(rows_path, encoder)
    bounded = eval_batches(make_loader(dataset), dataset, max_rounds=2)
    assert [one.batch.sample_ids[0][-2:] for one in bounded] == [":1", ":3"]


def test_workers_make_no_difference(rows_path, encoder):
    dataset, _ = prepared(rows_path, encoder)
    with_tokens, _ = prepared(rows_path, encoder)
    with_tokens.adopt(build_index(rows_path.parent / "index", with_tokens.samples, encoder))
    alone, helped = make_loader(dataset), make_loader(with_tokens, num_workers=2)
    for first, second in itertools.zip_longest(alone.batches(0), helped.batches(0)):
        assert_same(first, second)
    # Left halfway, a step starts anew; so does an earlier one after a resume.
    next(helped.batches(1))
    for step in (1, 2):
        for first, second in itertools.zip_longest(alone.batches(step), helped.batches(step)):
            assert_same(first, second)
    for _ in range(2):
        for first, second in itertools.zip_longest(eval_batches(alone, dataset), eval_batches(helped, with_tokens)):
            assert_same(first, second)
    helped.close()


def test_many_pixels_leave_a_worker_in_shared_memory_and_few_through_its_pipe(encoder, tmp_path):
    rows = []
    for number, side in enumerate((64, 400)):
        draw_image(tmp_path / f"{number}.png", side, side, seed=number)
        answer = {"role": "assistant", "content": "a square"}
        rows.append({"messages": [{"role": "user", "content": "<image>?"}, answer], "images": [f"{number}.png"]})
    dataset, _ = prepared(write_jsonl(tmp_path / "rows.jsonl", rows), encoder)
    alone, helped = (
        list(eval_batches(make_loader(dataset, num_workers=number), dataset, micro_batch_size=1)) for number in (0, 1)
    )
    for first, second in zip(alone, helped, strict=True):
        assert_same(first, second)
    sizes = [len(one.pixels.values_B) for one in helped]
    assert sizes[0] < LEAST_SHARED_BYTES <= sizes[1]
    assert [one.pixels.values_B.is_shared() for one in helped] == [False, True]


def test_error_of_a_worker_is_one_line_with_its_row(rows_path, encoder, tmp_path):
    dataset, _ = prepared(rows_path, encoder)
    break_pixels(tmp_path / "4_0.png")
    helped = make_loader(dataset, num_workers=1)
    with pytest.raises(UseError) as caught:
        for step in range(2):
            list(helped.batches(step))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{rows_path}:5: ")
    helped.close()


def test_worker_ends_quietly_while_its_queue_still_sends():
    """Without `_begin_worker` this aborts every time: the interpreter stops threads inside torch's C++."""
    program = """
import threading, time, torch
from megavlm.data.loader import _begin_worker
_begin_worker(0)
def send():
    while True:
        torch.empty(1000).share_memory_()
for _ in range(4):
    threading.Thread(target=send, daemon=True).start()
time.sleep(0.3)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


class _DeadlyEncoder(SampleEncoder):
    """Ends the worker that encodes a certain row, as the system does when memory runs out; once, or every time."""

    def __init__(self, encoder, deadly_row, marker, forever):
        super().__init__(encoder.inputs, encoder.image_spec, encoder.tokenizer, encoder.max_length)
        self.deadly_row, self.marker, self.forever = f":{deadly_row}", marker, forever

    def encode(self, sample, grids=()):
        if sample.sample_id.endswith(self.deadly_row) and torch.utils.data.get_worker_info() is not None:
            died_before = self.marker.exists()
            self.marker.touch()
            if self.forever or not died_before:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(sample, grids)


@pytest.mark.parametrize("forever", [False, True])
def test_a_worker_that_dies_is_replaced_once(rows_path, encoder, tmp_path, caplog, forever):
    for number in (1, 7, 10):  # pixels for shared memory, not only for the pipe
        draw_image(tmp_path / f"{number}_0.png", 400, 400)
    dataset, _ = prepared(rows_path, encoder)
    expected = list(make_loader(dataset).batches(0))
    assert any(len(one.pixels.values_B) >= LEAST_SHARED_BYTES for one in expected)
    deadly, _ = prepared(rows_path, _DeadlyEncoder(encoder, 4, tmp_path / "died", forever))
    loader = make_loader(deadly, num_workers=1)
    if forever:
        with pytest.raises(RunError, match=r"worker died .* again; step \d+, at the latest sample\(s\) .*rows\.jsonl:"):
            list(loader.batches(0)) and list(loader.batches(1))
    else:
        assert [one.batch.sample_ids for one in loader.batches(0)] == [one.batch.sample_ids for one in expected]
        assert "new ones take over" in caplog.text
    loader.close()


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "reset by peer"), FileNotFoundError("socket")])
def test_a_worker_that_dies_before_its_pixels_are_fetched_has_died(error):
    def stream():
        yield "a microbatch"
        raise error

    checked = _checked(stream())
    assert next(checked) == "a microbatch"
    with pytest.raises(RunError, match=r"a data loader worker died \(.+; is there enough memory\?\)"):
        next(checked)


def test_what_a_workers_own_code_raises_is_no_death():
    """As torch's DataLoader raises it again in the rank."""

    def stream():
        try:
            raise FileNotFoundError("no such thing")
        except FileNotFoundError:
            wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
        wrapped.reraise()
        yield

    with pytest.raises(FileNotFoundError, match="no such thing"):
        next(_checked(stream()))


@pytest.mark.parametrize("keeps_tokens", [False, True])
def test_memory_stays_flat_over_many_samples(encoder, tmp_path, keeps_tokens):
    """Two walks over the same rows, the second of which must not need more than the first has left behind.

    With MEGAVLM_FULL_MATRIX=1 a walk is 100,000 samples and may leave 16 MB behind, else 2,000 and 8 MB: 4 kB each.
    """
    num_rows, most_bytes = (100_000, 16 * 2**20) if os.environ.get("MEGAVLM_FULL_MATRIX") else (2_000, 8 * 2**20)
    draw_image(tmp_path / "picture.png", 96, 64)
    answer = {"role": "assistant", "content": "a red square"}
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(num_rows):
            question = {"role": "user", "content": f"<image>what is {number}?"}
            file.write(json.dumps({"messages": [question, answer], "images": ["picture.png"]}) + "\n")
    dataset = Dataset(Rows.open([str(tmp_path / "rows.jsonl")]), encoder, cached_tokens=25_000)
    if keeps_tokens:
        report = dataset.adopt(build_index(tmp_path / "index", dataset.samples, encoder))
    else:
        report = dataset.prepare()
    assert report.num_tokens > 25_000  # the cache is full after the first walk
    plan = GlobalBatchPlan(num_rows, 5, 100, 10, 1)
    loader = BatchLoader(
        dataset,
        lambda step: orders_of(dataset, [(row, False) for row in plan.microbatches(step, 0)]),
        sample_multiple=1,
        total_multiple=1,
    )
    process, after_walk = psutil.Process(), []
    for walk in range(2):
        for step in range(walk * num_rows // 100, (walk + 1) * num_rows // 100):
            assert sum(len(one.batch.sample_ids) for one in loader.batches(step)) == 100
        gc.collect()
        after_walk.append(process.memory_info().rss)
    grown = after_walk[1] - after_walk[0]
    assert grown < most_bytes, f"{grown / 2**20:.1f} MB more for {num_rows} samples more"


def test_everything_of_a_microbatch_is_pinned(rows_path, encoder, monkeypatch):
    """What torch's DataLoader calls for a GPU; here the copies are only marked."""
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self.clone()) or pinned[-1])
    dataset, _ = prepared(rows_path, encoder)
    (one, *_) = make_loader(dataset).batches(0)
    copy = pin_memory(one)
    assert_same(one, copy)
    tensors = [copy.pixels.values_B, *(value for value in vars(copy.batch).values() if isinstance(value, torch.Tensor))]
    assert len(tensors) >= 9 and {id(tensor) for tensor in tensors} == {id(tensor) for tensor in pinned}

"""The functions run on a worker: `megavlm.models.vision` imports megatron."""

import torch

# Frames, rows and columns: tall, wide, the table's own size, smaller and larger, several frames.
GRIDS = [(1, 2, 2), (1, 8, 4), (1, 4, 4), (1, 6, 20), (3, 4, 6)]
SIDE, HIDDEN = 4, 5


def test_geometry_equals_transformers(workers):
    workers(1).run(check_geometry)


def check_geometry():
    from transformers.vision_utils import get_vision_position_ids

    from megavlm.models.vision import patch_geometry

    grids = torch.tensor(GRIDS)
    for merge in (1, 2):
        geometry = patch_geometry(grids, merge)
        ours = torch.stack((geometry.rows_P, geometry.columns_P), dim=-1)
        assert torch.equal(ours, get_vision_position_ids(grids, merge))
        sizes = [grid for grid in GRIDS for _ in range(grid[0] * grid[1] * grid[2])]
        assert torch.stack((geometry.heights_P, geometry.widths_P), -1).tolist() == [list(size[1:]) for size in sizes]


def test_patches_of_a_visual_token_are_neighbours(workers):
    workers(1).run(check_blocks)


def check_blocks():
    from megavlm.models.vision import patch_geometry

    geometry = patch_geometry(torch.tensor([[1, 4, 6]]), 2)
    places = list(zip(geometry.rows_P.tolist(), geometry.columns_P.tolist(), strict=True))
    assert places[:8] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert sorted(places) == [(row, column) for row in range(4) for column in range(6)]


def test_positions_are_resampled_as_torch_does(workers):
    workers(1).run(check_interpolation)


def check_interpolation():
    from megavlm.models.vision import interpolate_positions, patch_geometry

    table = torch.randn(SIDE**2, HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_()
    picture = table.T.reshape(1, HIDDEN, SIDE, SIDE)
    # With merge size 1 also a single row and a single column.
    for merge, grids in ((2, GRIDS), (1, [(1, 1, 5), (1, 7, 1), (1, 1, 1), (1, 3, 4)])):
        geometry = patch_geometry(torch.tensor(grids), merge)
        expected, start = [], 0
        for frames, height, width in grids:
            size = {"size": (height, width), "mode": "bilinear", "align_corners": True}
            resampled = torch.nn.functional.interpolate(picture, **size)[0]
            places = slice(start, start + frames * height * width)
            expected.append(resampled[:, geometry.rows_P[places], geometry.columns_P[places]].T)
            start += frames * height * width
        actual = interpolate_positions(table, SIDE, geometry)
        torch.testing.assert_close(actual, torch.cat(expected), rtol=0, atol=1e-6)
        weights = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
        ours, theirs = (torch.autograd.grad((x * weights).sum(), table)[0] for x in (actual, torch.cat(expected)))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    half = interpolate_positions(table.detach().bfloat16(), SIDE, geometry)
    assert half.dtype == torch.bfloat16


def test_segments_are_frames(workers):
    workers(1).run(check_segments)


def check_segments():
    from megavlm.models.vision import frame_lengths, pack_params

    lengths = frame_lengths(torch.tensor(GRIDS))
    assert lengths == [4, 32, 16, 120, 24, 24, 24]
    packing = pack_params(lengths, torch.device("cpu"))
    assert packing.cu_seqlens_q.tolist() == [0, 4, 36, 52, 172, 196, 220, 244]
    assert packing.cu_seqlens_kv.tolist() == packing.cu_seqlens_q.tolist()
    assert packing.cu_seqlens_q.dtype == torch.int32 and packing.qkv_format == "thd"
    assert packing.max_seqlen_q == packing.max_seqlen_kv == 120


def test_layers_run_in_the_fp8_context_that_a_transformer_block_would_give_them(workers):
    workers(1).run(check_fp8_contexts)


def check_fp8_contexts():
    import contextlib
    from types import SimpleNamespace
    from unittest.mock import patch

    import torch
    from megatron.core.enums import Fp8Recipe

    from megavlm.models import vision

    inside, seen = [], []

    @contextlib.contextmanager
    def context(_config, number=-1):
        inside.append(number)
        yield
        inside.pop()

    class Layer:
        def __init__(self, number):
            self.layer_number = number

        def __call__(self, **arguments):
            seen.append((self.layer_number, list(inside)))
            return arguments["hidden_states"], None

    for recipe, expected in ((Fp8Recipe.delayed, [(3, [-1]), (4, [-1])]), (Fp8Recipe.tensorwise, [(3, [2]), (4, [3])])):
        config = SimpleNamespace(fp8="hybrid", fp8_recipe=recipe, recompute_granularity=None)
        block = SimpleNamespace(config=config, training=True, layers=[Layer(3), Layer(4)])
        seen.clear()
        with patch.object(vision, "get_fp8_context", context):
            _, kept = vision.run_layers(block, torch.zeros(16, 1, 4), [None, None], None, [3])
        assert seen == expected and len(kept) == 1


def test_fp8_products_take_whole_blocks_of_patches(workers):
    workers(1).run(check_filled_up_patches)


def check_filled_up_patches():
    """What is behind the patches changes nothing of them, nor of their gradients, and is never given out."""
    import contextlib
    from types import SimpleNamespace
    from unittest.mock import patch

    import torch
    from megatron.core.enums import Fp8Recipe

    from megavlm.models import vision
    from megavlm.parallel.attention import packed_attention

    seen = []

    class Layer:
        """Attention within segments, rotated by the angles."""

        def __init__(self, number):
            self.layer_number = number

        def __call__(self, hidden_states, packed_seq_params, rotary_pos_emb, attention_mask):
            borders = packed_seq_params.cu_seqlens_q.tolist()
            assert borders[-1] == len(hidden_states) == len(rotary_pos_emb)
            seen.append((len(hidden_states), borders))
            turned = hidden_states * rotary_pos_emb[:, 0].cos()
            return hidden_states + packed_attention(turned, turned, hidden_states, borders, False, 0.5)[:, None], None

    frames, windows = vision.pack_params([12, 8], "cpu"), vision.pack_params([4] * 5, "cpu")
    start, angles = torch.randn(20, 1, 4), torch.randn(20, 1, 1, 4)
    found = []
    for fp8, recipe in ((None, None), ("hybrid", Fp8Recipe.blockwise), ("hybrid", Fp8Recipe.mxfp8)):
        config = SimpleNamespace(fp8=fp8, fp8_recipe=recipe, recompute_granularity=None)
        block = SimpleNamespace(config=config, training=True, layers=[Layer(1), Layer(2)])
        hidden = start.clone().requires_grad_()
        with patch.object(vision, "get_fp8_context", lambda *_: contextlib.nullcontext()):
            last, kept = vision.run_layers(block, hidden, [frames, windows], angles, [0])
        (last.square().sum() + kept[0].sum()).backward()
        found.append((last, kept[0], hidden.grad))
    assert seen == [
        (20, [0, 12, 20]),
        (20, [0, 4, 8, 12, 16, 20]),
        *[(32, [0, 12, 20, 32]), (32, [0, 4, 8, 12, 16, 20, 32])] * 2,
    ]
    for other in found[1:]:
        for one, expected in zip(other, found[0], strict=True):
            assert torch.equal(one, expected)

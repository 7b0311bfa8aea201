import pytest
import torch

from megavlm.errors import UseError
from megavlm.models.weight_map import (
    RowRun,
    check_names,
    direct,
    flattened,
    fused_qkv,
    gated,
    language_entries,
    row_runs,
    split_qkv,
    transposed_experts,
    unsqueezed,
)

GROUPS, QUERIES_PER_GROUP, HEAD_DIM, HIDDEN = 2, 3, 4, 5
HEADS = GROUPS * QUERIES_PER_GROUP


def numbered(*shape):
    """Every element is different, so that a wrong order shows."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def qkv(*rest):
    """Separate projections; rows are head * 100 + row in the head, keys from 1000 on, values from 2000 on."""
    parts = []
    for base, heads in ((0, HEADS), (1000, GROUPS), (2000, GROUPS)):
        rows = base + torch.arange(heads)[:, None] * 100.0 + torch.arange(HEAD_DIM)
        parts.append(rows.reshape(-1, *[1] * len(rest)).expand(-1, *rest).clone())
    return parts


KINDS = {
    "direct": (direct("n", "a"), [numbered(4, 3)]),
    "flattened": (flattened("n", "a", (3, 2, 4, 4)), [numbered(6, 3, 2, 4, 4)]),
    "split qkv, weights": (split_qkv("n", ("q", "k", "v"), GROUPS, HEAD_DIM), qkv(HIDDEN)),
    "split qkv, biases": (split_qkv("n", ("q", "k", "v"), GROUPS, HEAD_DIM), qkv()),
    "fused qkv, weights": (fused_qkv("n", "a", HEADS), [numbered(3 * HEADS * HEAD_DIM, HIDDEN)]),
    "fused qkv, biases": (fused_qkv("n", "a", HEADS), [numbered(3 * HEADS * HEAD_DIM)]),
    "gated": (gated("n", "g", "u"), [numbered(8, 3), 100 + numbered(8, 3)]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(kind, dtype):
    entry, tensors = KINDS[kind]
    tensors = [tensor.to(dtype) for tensor in tensors]
    native = entry.to_native(tensors)
    assert native.numel() == sum(tensor.numel() for tensor in tensors) and native.dtype == dtype
    back = entry.to_hf(native)
    assert len(back) == len(entry.names) == len(tensors)
    for before, after in zip(tensors, back, strict=True):
        assert after.shape == before.shape and torch.equal(after, before)
    assert torch.equal(entry.to_native(back), native)


def test_split_qkv_puts_each_groups_queries_before_its_key_and_value():
    entry, tensors = KINDS["split qkv, biases"]
    heads = entry.to_native(tensors).reshape(-1, HEAD_DIM)[:, 0].tolist()
    assert heads == [0, 100, 200, 1000, 2000, 300, 400, 500, 1100, 2100]


def test_fused_qkv_puts_each_heads_query_key_and_value_together():
    entry, (tensor,) = KINDS["fused qkv, biases"]
    first_rows = entry.to_native([tensor]).reshape(-1, HEAD_DIM)[:, 0]
    per_part = HEADS * HEAD_DIM
    assert first_rows[:6].tolist() == [
        0,
        per_part,
        2 * per_part,
        HEAD_DIM,
        per_part + HEAD_DIM,
        2 * per_part + HEAD_DIM,
    ]


def test_gated_is_gate_then_up_and_cut_in_halves():
    entry, (gate, up) = KINDS["gated"]
    assert entry.halves and torch.equal(entry.to_native([gate, up]), torch.cat((gate, up)))
    assert not any(other.halves for name, (other, _) in KINDS.items() if name != "gated")


@pytest.mark.parametrize("kind", [*KINDS, "scalar", "no rows"])
def test_runs_of_rows_are_the_native_tensor(kind):
    more = {
        "scalar": (direct("n", "a"), [torch.tensor(3.0)]),
        "no rows": (gated("n", "g", "u"), [torch.empty(0, 3), torch.empty(0, 3)]),
    }
    entry, tensors = (KINDS | more)[kind]
    rows = {
        name: tensor.reshape(*tensor.shape[:1] or (1,), -1) if tensor.numel() else tensor
        for name, tensor in zip(entry.names, tensors, strict=True)
    }
    runs = row_runs(entry, [tuple(tensor.shape) for tensor in tensors])
    joined = torch.cat([torch.empty(0), *(rows[run.name][run.start :][: run.num_rows].flatten() for run in runs)])
    assert torch.equal(joined, entry.to_native(tensors).flatten())


def test_rows_that_lie_together_are_one_run():
    assert row_runs(direct("n", "a"), [(7, 2)]) == [RowRun("a", 0, 7)]
    assert row_runs(gated("n", "g", "u"), [(4, 2), (4, 2)]) == [RowRun("g", 0, 4), RowRun("u", 0, 4)]
    queries = QUERIES_PER_GROUP * HEAD_DIM
    shapes = [(GROUPS * queries, HIDDEN), (GROUPS * HEAD_DIM, HIDDEN), (GROUPS * HEAD_DIM, HIDDEN)]
    assert row_runs(KINDS["split qkv, weights"][0], shapes) == [
        RowRun(name, group * num_rows, num_rows)
        for group in range(GROUPS)
        for name, num_rows in (("q", queries), ("k", HEAD_DIM), ("v", HEAD_DIM))
    ]


def test_what_changes_within_rows_is_not_made_of_runs():
    for entry in (unsqueezed("n", "a", 2), transposed_experts("n", "a", 3, halves=True)):
        with pytest.raises(AssertionError):
            row_runs(entry, [(1, 1, 4)])


def test_flattened_does_what_the_convolution_does():
    entry, _ = KINDS["flattened"]
    weight, pixels = torch.randn(6, 3, 2, 4, 4, dtype=torch.float64), torch.randn(7, 3, 2, 4, 4, dtype=torch.float64)
    expected = torch.nn.functional.conv3d(pixels, weight, stride=(2, 4, 4)).flatten(1)
    torch.testing.assert_close(pixels.flatten(1) @ entry.to_native([weight]).T, expected)


@pytest.mark.parametrize(
    ("qk_norm", "bias", "per_layer"), [(False, False, 8 + 1), (True, False, 11), (False, True, 12)]
)
def test_language_entries_name_every_tensor_once(qk_norm, bias, per_layer):
    entries = language_entries(3, GROUPS, HEAD_DIM, "model.", qk_norm, bias)
    names = [name for entry in entries for name in entry.names]
    natives = [entry.native for entry in entries]
    assert len(set(names)) == len(names) == 2 + 3 * per_layer and len(set(natives)) == len(natives)
    assert all(name.startswith("model.") for name in names) and all(n.startswith("language.") for n in natives)


ENTRIES = [direct("x", "a"), gated("y", "g", "u")]


def test_complete_names_pass_and_ignored_ones_may_be_there_or_not():
    check_names(ENTRIES, ["a", "g", "u"], [], "dir")
    check_names(ENTRIES, ["a", "g", "u", "extra"], ["extra", "absent"], "dir")


def test_missing_and_left_over_names_are_listed():
    with pytest.raises(UseError) as error:
        check_names(ENTRIES, ["a", "u", "z2", "z1"], ["other"], "some/dir")
    message = str(error.value)
    assert message.startswith("some/dir: ") and "\n" not in message
    assert "missing: g;" in message and "left over: z1, z2;" in message


def test_long_lists_are_cut():
    with pytest.raises(UseError, match=r"left over: n0, n1, n2, n3, n4 and 3 more;"):
        check_names(ENTRIES, ["a", "g", "u", *(f"n{i}" for i in range(8))], [], "dir")


def test_a_tensor_mapped_twice_is_our_own_bug():
    with pytest.raises(AssertionError, match="twice"):
        check_names([direct("x", "a"), direct("y", "a")], ["a"], [], "dir")

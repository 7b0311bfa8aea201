import torch

from megavlm.models.merge import feature_rows, merge_features

IMAGE, HIDDEN, SLOTS = 9, 4, 3
TOKENS = torch.tensor([1, IMAGE, IMAGE, 2, 3, IMAGE, 4])


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(len(TOKENS), HIDDEN, generator=generator).requires_grad_()
    features = torch.randn(3, SLOTS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    return embeddings, features


def test_rows_count_visual_tokens_in_order():
    assert feature_rows(TOKENS, IMAGE).tolist() == [-1, 0, 1, -1, -1, 2, -1]
    assert feature_rows(torch.tensor([1, 2]), IMAGE).tolist() == [-1, -1]
    assert feature_rows(torch.tensor([IMAGE, IMAGE]), IMAGE).tolist() == [0, 1]


def test_features_stand_at_visual_tokens_and_words_elsewhere():
    embeddings, features = inputs()
    hidden = merge_features(embeddings, features, feature_rows(TOKENS, IMAGE))
    assert hidden.shape == (len(TOKENS), SLOTS, HIDDEN)
    assert torch.equal(hidden[[1, 2, 5]], features)
    words = [0, 3, 4, 6]
    assert torch.equal(hidden[words, 0], embeddings[words]) and not hidden[words, 1:].any()


def test_gradients_go_where_the_values_came_from():
    embeddings, features = inputs()
    hidden = merge_features(embeddings, features, feature_rows(TOKENS, IMAGE))
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden * weights).sum().backward()
    assert torch.equal(features.grad, weights[[1, 2, 5]])
    assert torch.equal(embeddings.grad[[0, 3, 4, 6]], weights[[0, 3, 4, 6], 0])
    assert not embeddings.grad[[1, 2, 5]].any()


def test_a_rank_that_holds_a_part_of_the_row_takes_its_features():
    embeddings, features = inputs()
    rows = feature_rows(TOKENS, IMAGE)
    whole = merge_features(embeddings, features, rows)
    part = [5, 6, 0, 1]  # any order, as context parallelism cuts
    assert torch.equal(merge_features(embeddings[part], features, rows[part]), whole[part])
    assert torch.equal(merge_features(embeddings[[0, 3]], features, rows[[0, 3]]), whole[[0, 3]])


def test_words_alone_have_no_further_slots():
    embeddings, _ = inputs()
    hidden = merge_features(embeddings, None, torch.full((len(TOKENS),), -1))
    assert hidden.shape == (len(TOKENS), 1, HIDDEN)
    assert torch.equal(hidden[:, 0], embeddings)


def test_features_take_the_type_of_the_embeddings():
    embeddings, features = inputs(torch.bfloat16)
    hidden = merge_features(embeddings, features, feature_rows(TOKENS, IMAGE))
    assert hidden.dtype == torch.float32 and torch.equal(hidden[1], features[0].float())


def test_features_may_be_taken_more_than_once_and_their_gradients_add_up():
    tokens_T = torch.tensor([9, 1, 9, 9, 2, 9])
    rows_T = feature_rows(tokens_T, 9, torch.tensor([0, 1, 0, 1]))
    assert rows_T.tolist() == [0, -1, 1, 0, -1, 1]
    features_VKH = torch.randn(2, 1, 3, requires_grad=True)
    merged_TKH = merge_features(torch.zeros(6, 3), features_VKH, rows_T)
    torch.testing.assert_close(merged_TKH[[0, 3]], features_VKH[[0, 0]], rtol=0, atol=0)
    merged_TKH.backward(torch.arange(6.0)[:, None, None].expand(6, 1, 3))
    assert features_VKH.grad[:, 0, 0].tolist() == [3.0, 7.0]

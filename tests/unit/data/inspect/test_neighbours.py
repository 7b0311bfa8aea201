import pytest
import torch

from megavlm.data.inspect import neighbours
from megavlm.data.inspect.neighbours import nearest


@pytest.mark.parametrize(("chunk_queries", "chunk_items"), [(1000, 1000), (7, 5), (1, 1)])
def test_chunks_find_what_one_product_does(monkeypatch, chunk_queries: int, chunk_items: int) -> None:
    monkeypatch.setattr(neighbours, "CHUNK_QUERIES", chunk_queries)
    monkeypatch.setattr(neighbours, "CHUNK_ITEMS", chunk_items)
    generator = torch.Generator().manual_seed(0)
    queries, items = torch.randn(20, 8, generator=generator), torch.randn(33, 8, generator=generator)
    own = torch.stack([torch.arange(20).repeat(2), torch.randint(33, (40,), generator=generator)], dim=1)
    products = queries @ items.T
    products[own[:, 0], own[:, 1]] = -torch.inf
    values, places = products.topk(4, dim=1)
    found_values, found = nearest(queries, items, own, 4)
    assert torch.equal(found, places)
    torch.testing.assert_close(found_values, values, rtol=1e-6, atol=1e-6)


def test_own_items_are_never_found() -> None:
    own = torch.tensor([[0, 0], [0, 1], [1, 2]])
    values, found = nearest(torch.eye(2), torch.ones(3, 2), own, 5)
    assert found[0].tolist() == [2, -1, -1] and values[0].tolist() == [1, -torch.inf, -torch.inf]
    assert sorted(found[1].tolist()) == [-1, 0, 1]

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import SiglipConfig, SiglipModel
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from megavlm.losses.contrastive import clip_loss, retrieval_hits, siglip_loss

WIDTH = 6
# Pairs of each rank, by number of ranks: unequal, and none at all.
SHARES = {1: [9], 2: [6, 3], 4: [2, 4, 0, 3]}
NUM_PAIRS = 9


class Alone:
    """A group of this process alone."""

    def rank(self):
        return 0

    def size(self):
        return 1


def example():
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(NUM_PAIRS, WIDTH, generator=generator), dim=1) for _ in range(2))
    return images, texts, torch.tensor(1.7), torch.tensor(-1.3)


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def plain_clip(images, texts, scale, bias):
    """transformers' loss, over all pairs."""
    return image_text_contrastive_loss(texts @ images.T * scale.exp())


def plain_siglip(images, texts, scale, bias):
    """From the paper's pseudocode (algorithm 1): labels of -1 off the diagonal, log sigmoid, a mean over images."""
    logits = images @ texts.T * scale.exp() + bias
    labels = 2 * torch.eye(len(images)) - 1
    return -F.logsigmoid(labels * logits).sum() / len(images)


PLAIN = {"clip": plain_clip, "siglip": plain_siglip}


def ours(name, images, texts, scale, bias, group, block_size):
    if name == "clip":
        return clip_loss(images, texts, scale, group, block_size)
    return siglip_loss(images, texts, scale, bias, group, block_size)


@pytest.mark.parametrize("block_size", [2, 4, 4096])
@pytest.mark.parametrize("name", PLAIN)
def test_one_process_equals_the_plain_loss(name, block_size):
    expected_leaves, actual_leaves = leaves(*example()), leaves(*example())
    expected = PLAIN[name](*expected_leaves)
    expected.backward()
    loss_sum, count, metrics = ours(name, *actual_leaves, Alone(), block_size)
    (loss_sum / count).backward()
    assert count == NUM_PAIRS and metrics == {}
    torch.testing.assert_close(loss_sum / count, expected, rtol=1e-6, atol=0)
    for actual, wanted in zip(actual_leaves, expected_leaves, strict=True):
        if name == "siglip" or actual is not actual_leaves[3]:
            torch.testing.assert_close(actual.grad, wanted.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("num_ranks", SHARES)
def test_ranks_equal_one_process(num_ranks, name, workers):
    expected_leaves = leaves(*example())
    expected = PLAIN[name](*expected_leaves)
    expected.backward()
    images, texts, scale, bias = example()
    shares = SHARES[num_ranks]
    results = workers(num_ranks).run(
        part_of_rank, name=name, images=images.split(shares), texts=texts.split(shares), scale=scale, bias=bias
    )
    losses, counts, image_grads, text_grads, scale_grads, bias_grads = zip(*results, strict=True)
    assert [int(count) for count in counts] == shares
    torch.testing.assert_close(sum(losses) / NUM_PAIRS, expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat(image_grads) / NUM_PAIRS, expected_leaves[0].grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(text_grads) / NUM_PAIRS, expected_leaves[1].grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sum(scale_grads) / NUM_PAIRS, expected_leaves[2].grad, rtol=1e-5, atol=1e-6)
    if name == "siglip":
        torch.testing.assert_close(sum(bias_grads) / NUM_PAIRS, expected_leaves[3].grad, rtol=1e-5, atol=1e-6)


def part_of_rank(name, images, texts, scale, bias):
    group = dist.group.WORLD
    parts = leaves(images[group.rank()], texts[group.rank()], scale, bias)
    loss_sum, count, _ = ours(name, *parts, group, block_size=4)
    loss_sum.backward()
    return loss_sum.detach(), count, *(part.grad for part in parts)


def test_siglip_equals_the_model_of_transformers():
    """Its whole model gives embeddings and a loss; the loss here is made from the same embeddings."""
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = tower | {"image_size": 16, "patch_size": 8}
    text = tower | {"vocab_size": 20, "max_position_embeddings": 5, "projection_size": 16}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=copy.deepcopy(vision))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.logit_scale.fill_(0.9)
        model.logit_bias.fill_(-0.4)
        output = model(
            input_ids=torch.randint(20, (5, 5), generator=generator),
            pixel_values=torch.randn(5, 3, 16, 16, generator=generator),
            return_loss=True,
        )
        loss_sum, count, _ = siglip_loss(
            output.image_embeds, output.text_embeds, model.logit_scale[0], model.logit_bias[0], Alone(), 2
        )
    torch.testing.assert_close(loss_sum / count, output.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", PLAIN)
def test_large_scales_stay_finite(name):
    images, texts, _, bias = example()
    parts = leaves(images, texts, torch.tensor(7.0), bias)
    ours(name, *parts, Alone(), 4)[0].backward()
    assert all(part.grad.isfinite().all() for part in parts[:3])


def test_nothing_of_the_size_of_all_pairs_squared_is_kept():
    """What the backward pass holds on to grows with the number of pairs, not with its square."""
    sizes = []
    for num_pairs in (64, 128):
        images, texts, scale, bias = *(torch.randn(num_pairs, WIDTH) for _ in range(2)), *example()[2:]
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            for name in PLAIN:
                ours(name, *leaves(images, texts, scale, bias), Alone(), 8)
        sizes.append(sum(kept.values()))
    assert sizes[1] <= 2 * sizes[0]


@pytest.mark.parametrize("block_size", [1, 2, 4096])
def test_a_row_is_a_hit_when_no_other_column_is_closer(block_size):
    rows = F.normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0], [1.0, 1.0], [1.0, -1.0]]), dim=1)
    columns = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [2.0, 0.0]]), dim=1)
    assert retrieval_hits(rows, columns, 0, block_size).tolist() == [1, 1, 1, 1]  # equal ones count
    columns[3] = torch.tensor([0.8, 0.6])
    assert retrieval_hits(rows, columns, 0, block_size).tolist() == [1, 1, 0, 0]
    assert retrieval_hits(rows[2:], columns, 2, block_size).tolist() == [0, 0]
    assert retrieval_hits(rows[:0], columns, 0, block_size).tolist() == []


def test_hits_are_those_of_all_cosines():
    images, texts, *_ = example()
    expected = (images @ texts.T).argmax(1) == torch.arange(NUM_PAIRS)
    assert retrieval_hits(images, texts, 0, 4).bool().tolist() == expected.tolist()

"""Masks against transformers: its model's hidden states, the head and LISA's losses in plain torch, mask by mask.

Shape suffixes: S tokens of a sample, Y vocabulary, V visual tokens of an image.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megavlm.config.tasks import SEGMENT_TOKEN
from tests.evidence import record, row
from tests.parity import mask_cases
from tests.parity.reference import Reference, load_reference, model_inputs
from tests.tiny_masks import add_segment_token, with_masks, write_mask_head

WIDTH, COEFFICIENT, BCE, DICE = 12, 0.7, 2.0, 0.5
KNOBS = {"mask_loss_coeff": COEFFICIENT, "mask_head_dim": WIDTH}
LIMITS = {"loss": 1e-5, "gradients": 1e-5}
LAYOUTS = {
    "one process": (1, {}, 1),
    "one process, packed": (1, {}, 4),
    "TP2+SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, 2),
    "CP2": (2, {"context_parallel_size": 2, "cp_comm_type": "p2p"}, 2),
    "PP2": (2, {"pipeline_model_parallel_size": 2}, 1),
    "DP2": (2, {}, 1),
}


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    root = tmp_path_factory.mktemp("masks")
    random = np.random.RandomState(5)
    lines = []
    for number, sizes in enumerate([[(64, 96)], [(130, 40), (33, 71)], [], [(90, 50)]]):
        names = [f"{number}-{image}.png" for image in range(len(sizes))]
        for name, (width, height) in zip(names, sizes, strict=True):
            Image.fromarray(random.randint(0, 256, (height, width, 3)).astype(np.uint8)).save(root / name)
        turns = [
            {"role": "user", "content": "<image>" * len(sizes) + "what is in this image?"},
            {"role": "assistant", "content": "the quick brown fox"},
        ]
        lines.append(json.dumps(with_masks({"messages": turns, "images": names}, root, number, random)) + "\n")
    # A mask in an answer that is not learned is no mask of the loss.
    last = json.loads(lines[-1])
    unlearned = [{"role": "user", "content": "which?"}, {"role": "assistant", "content": SEGMENT_TOKEN, "loss": False}]
    last["messages"] = last["messages"] + unlearned + [{"role": "user", "content": "and?"}, last["messages"][1]]
    last["masks"] = last["masks"] + last["masks"][:1] + last["masks"]
    lines[-1] = json.dumps(last) + "\n"
    (root / "rows.jsonl").write_text("".join(lines))
    return root / "rows.jsonl"


def masks_of(item, hidden_SH, head, token_id, image_id):
    """(weighted loss, intersection over union) of each mask of a sample that is learned."""
    tokens = item.encoded.tokens_S.tolist()
    weights = item.encoded.loss_weights_S()
    places = [at for at, token in enumerate(tokens) if token == token_id]
    assert len(places) == len(item.encoded.masks)
    found = []
    for at, mask in zip(places, item.encoded.masks, strict=True):
        if not weights[at]:
            continue
        end = mask.start + len(mask.shares_V)
        assert set(tokens[mask.start : end]) == {image_id}
        hidden = F.relu(F.linear(hidden_SH[at], head["mask_head.query_in.weight"], head["mask_head.query_in.bias"]))
        query = F.linear(hidden, head["mask_head.query_out.weight"], head["mask_head.query_out.bias"])
        pixels = F.linear(hidden_SH[mask.start : end], head["mask_head.image.weight"], head["mask_head.image.bias"])
        logits_V, target_V = pixels @ query / WIDTH**0.5, torch.from_numpy(mask.shares_V)
        bce = F.binary_cross_entropy_with_logits(logits_V, target_V)
        p_V = logits_V.sigmoid()
        dice = 1 - (2 * (p_V * target_V).sum() + 1) / (p_V.sum() + target_V.sum() + 1)
        is_found, is_covered = p_V > 0.5, target_V >= 0.5
        either = int((is_found | is_covered).sum())
        found.append((BCE * bce + DICE * dice, int((is_found & is_covered).sum()) / either if either else 1.0))
    return found


def whole_batch(hf_dir, items):
    """Loss and gradients of all rows at once, and the mean intersection over union."""
    model = load_reference(hf_dir)
    token_id = AutoTokenizer.from_pretrained(hf_dir).get_vocab()[SEGMENT_TOKEN]
    head = {name: one.requires_grad_() for name, one in load_file(hf_dir / "mask_head" / "model.safetensors").items()}
    losses, weights, masks = [], [], []
    for item in items:
        hidden_SH = model.model(**model_inputs(model, item)).last_hidden_state[0]  # what the output layer takes
        logits_SY = model.lm_head(hidden_SH).float()
        tokens_S = torch.from_numpy(item.encoded.tokens_S)
        weights_S = torch.from_numpy(item.encoded.loss_weights_S())[1:]
        losses.append((F.cross_entropy(logits_SY[:-1], tokens_S[1:], reduction="none") * weights_S).sum())
        weights.append(weights_S.sum())
        masks += masks_of(item, hidden_SH, head, token_id, model.config.image_token_id)
    assert len(masks) == 9
    loss = torch.stack(losses).sum() / torch.stack(weights).sum()
    loss = loss + COEFFICIENT * torch.stack([one for one, _ in masks]).mean()
    loss.backward()
    learned = dict(model.named_parameters()) | head
    gradients = {name: None if one.grad is None else one.grad.clone() for name, one in learned.items()}
    return Reference(torch.zeros(0), loss.item(), gradients), sum(iou for _, iou in masks) / len(masks)


@pytest.fixture(scope="module")
def expected(model_dirs, rows_file, tmp_path_factory, workers):
    """Directory, reference and mean intersection over union of a family, made once."""
    done = {}

    def reference_of(family):
        if family not in done:
            hf_dir = tmp_path_factory.mktemp("heads") / family
            shutil.copytree(model_dirs[family], hf_dir)
            add_segment_token(hf_dir)
            write_mask_head(hf_dir, WIDTH)
            (items,) = workers(1).run(mask_cases.items_of, hf_dir=hf_dir, rows_file=rows_file, knobs=KNOBS)
            done[family] = hf_dir, *whole_batch(hf_dir, items)
        return done[family]

    return reference_of


CASES = [("qwen3_vl", layout) for layout in LAYOUTS] + [
    (family, layout) for family in ("llava", "qwen2_5_vl") for layout in ("one process", "CP2")
]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_step_with_masks(family, layout, expected, rows_file, workers):
    hf_dir, reference, iou = expected(family)
    num_ranks, parallel, micro_batch_size = LAYOUTS[layout]
    ranks = workers(num_ranks).run(
        mask_cases.step_against,
        hf_dir=hf_dir,
        rows_file=rows_file,
        expected=reference,
        knobs=KNOBS,
        parallel=parallel,
        micro_batch_size=micro_batch_size,
    )
    figures = {name: max(measured[name] for measured, _ in ranks) for name in LIMITS}
    record(
        "parity",
        [
            row(
                f"{family}, masks, {layout}: {name}",
                value,
                unit="relative difference" + (", worst parameter" if name == "gradients" else ""),
                required=f"<= {LIMITS[name]:g}",
                reference="transformers' hidden states, head and losses of masks in plain torch",
                reference_value=0.0,
                command="make test TESTS=tests/parity",
            )
            for name, value in figures.items()
        ],
    )
    assert all(value <= LIMITS[name] for name, value in figures.items()), (figures, ranks[0][0]["worst parameter"])
    trains = {name for measured, _ in ranks for name in measured["unused there"]}
    assert not any("mask_head" in name for name in trains)
    for _, said in ranks:
        assert said["mask/count"] == 9 and said["mask/iou"] == pytest.approx(iou, abs=1e-6)
    assert 0 < iou < 1


def test_the_query_of_another_token_would_be_noticed(expected, rows_file, workers):
    hf_dir, reference, _ = expected("qwen3_vl")
    ((measured, _),) = workers(1).run(
        mask_cases.step_against,
        hf_dir=hf_dir,
        rows_file=rows_file,
        expected=reference,
        knobs=KNOBS,
        parallel={},
        micro_batch_size=1,
        broken=True,
    )
    assert measured["loss"] > 100 * LIMITS["loss"] and measured["gradients"] > 100 * LIMITS["gradients"]

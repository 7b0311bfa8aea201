"""Embeddings against transformers: its model, a linear layer on the last hidden state, and the loss of the whole batch.

Shape suffixes: M rows, D width of embeddings.
"""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from tests.evidence import record, row
from tests.parity import contrastive_cases
from tests.parity.reference import Reference, load_reference, processor_inputs

WIDTH = 12
LIMITS = {"loss": 1e-5, "gradients": 1e-5}
TEXT_PROMPT = "what is it?"
# Question, caption, and sizes of the images.
CAPTIONS = [
    ("what is in this image?", "a red square", [(64, 96)]),
    ("which is the largest?", "the blue circle and nothing else 0 1 2 3", [(130, 40), (33, 71)]),
    ("the quick brown fox?", "jumps", [(50, 50)]),
    ("which number is this?", "7", [(48, 48)]),
]
LOSSES = {"softmax": {"logit_scale": 2.3, "logit_bias": 0.0}, "sigmoid": {"logit_scale": 1.4, "logit_bias": -1.7}}


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    root = tmp_path_factory.mktemp("captions")
    random = np.random.default_rng(3)
    lines = []
    for number, (question, caption, sizes) in enumerate(CAPTIONS):
        names = [f"{number}-{image}.png" for image in range(len(sizes))]
        for name, (width, height) in zip(names, sizes, strict=True):
            Image.fromarray(random.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(root / name)
        turns = [
            {"role": "user", "content": "<image>" * len(sizes) + question},
            {"role": "assistant", "content": caption},
        ]
        lines.append(json.dumps({"messages": turns, "images": names}) + "\n")
    (root / "rows.jsonl").write_text("".join(lines))
    return root / "rows.jsonl"


def with_head(hf_dir, out_dir, scale_and_bias):
    """A copy of a directory with a head for embeddings."""
    shutil.copytree(hf_dir, out_dir)
    weights = load_file(out_dir / "model.safetensors")
    config = json.loads((out_dir / "config.json").read_text())
    width = config["text_config"]["hidden_size"]
    weights["embedding_head.weight"] = torch.randn(WIDTH, width, generator=torch.Generator().manual_seed(4))
    weights |= {name: torch.tensor([value]) for name, value in scale_and_bias.items()}
    save_file(weights, out_dir / "model.safetensors", metadata={"format": "pt"})
    return out_dir


def embedding(hf_dir, model, head, messages, images):
    """Of a question, as E5-V has it: the last hidden state of what a model is asked, through a linear layer."""
    hidden_1SH = model.model(**processor_inputs(hf_dir, messages, images, asks=True)).last_hidden_state
    return F.normalize(F.linear(hidden_1SH[0, -1], head), dim=0)


def whole_batch(hf_dir, rows_file, loss_type):
    """Loss and gradients of all rows at once, by transformers' model and plain autograd."""
    model = load_reference(hf_dir)
    weights = load_file(hf_dir / "model.safetensors")
    names = ("embedding_head.weight", "logit_scale", "logit_bias")
    head, scale, bias = (weights[name].clone().requires_grad_() for name in names)
    images_M, texts_M = [], []
    for number, (question, caption, sizes) in enumerate(CAPTIONS):
        shown = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": question}]
        files = [rows_file.parent / f"{number}-{image}.png" for image in range(len(sizes))]
        images_M.append(embedding(hf_dir, model, head, [{"role": "user", "content": shown}], files))
        said = [{"type": "text", "text": f"{caption}\n{TEXT_PROMPT}"}]
        texts_M.append(embedding(hf_dir, model, head, [{"role": "user", "content": said}], []))
    logits_MM = scale.exp() * torch.stack(texts_M) @ torch.stack(images_M).T
    if loss_type == "softmax":
        loss = image_text_contrastive_loss(logits_MM)
    else:  # the paper's pseudocode (arXiv 2303.15343, algorithm 1)
        signs_MM = 2 * torch.eye(len(CAPTIONS)) - 1
        loss = -F.logsigmoid(signs_MM * (logits_MM + bias)).sum() / len(CAPTIONS)
    loss.backward()
    learned = dict(model.named_parameters()) | dict(zip(names, (head, scale, bias), strict=True))
    gradients = {name: None if one.grad is None else one.grad.clone() for name, one in learned.items()}
    return Reference(torch.zeros(0), loss.item(), gradients)


@pytest.fixture(scope="module")
def expected(model_dirs, rows_file, tmp_path_factory):
    """Directory and reference of (family, kind of loss), made once."""
    done = {}

    def reference_of(family, loss_type):
        if (family, loss_type) not in done:
            out_dir = tmp_path_factory.mktemp("heads") / family
            hf_dir = with_head(model_dirs[family], out_dir, LOSSES[loss_type])
            done[family, loss_type] = hf_dir, whole_batch(hf_dir, rows_file, loss_type)
        return done[family, loss_type]

    return reference_of


def knobs_of(loss_type):
    return {"loss_type": loss_type, "embedding_dim": WIDTH, "text_prompt": TEXT_PROMPT}


@pytest.mark.parametrize(("num_ranks", "micro_batch_size"), [(1, 1), (1, 4), (2, 1)])
@pytest.mark.parametrize(("family", "loss_type"), [("qwen3_vl", "softmax"), ("llava", "sigmoid")])
def test_a_step_is_that_of_the_whole_batch(
    family, loss_type, num_ranks, micro_batch_size, expected, rows_file, workers
):
    hf_dir, reference = expected(family, loss_type)
    ranks = workers(num_ranks).run(
        contrastive_cases.step_against,
        hf_dir=hf_dir,
        rows_file=rows_file,
        expected=reference,
        knobs=knobs_of(loss_type),
        micro_batch_size=micro_batch_size,
        parallel={},
    )
    figures = {name: max(rank[name] for rank in ranks) for name in LIMITS}
    where = f"{family}, contrastive {loss_type}, DP{num_ranks}, micro batch {micro_batch_size}"
    record(
        "parity",
        [
            row(
                f"{where}: {name}",
                value,
                unit="relative difference" + (", worst parameter" if name == "gradients" else ""),
                required=f"<= {LIMITS[name]:g}",
                reference="transformers, the loss of the whole batch by autograd",
                reference_value=0.0,
                command="make test TESTS=tests/parity",
            )
            for name, value in figures.items()
        ],
    )
    assert all(value <= LIMITS[name] for name, value in figures.items()), (figures, ranks[0]["worst parameter"])
    # All learn but what a caption's text never needs: a bias that softmax has none of.
    unused = {"language.output_layer.logit_bias"} if loss_type == "softmax" else set()
    assert {name for name in ranks[0]["unused there"] if "output_layer" in name} == unused
    assert ranks[0]["compared"] > 20 and not math.isnan(figures["loss"])


def test_gradients_from_rows_of_others_would_be_missed(expected, rows_file, workers):
    hf_dir, reference = expected("qwen3_vl", "softmax")
    (measured,) = workers(1).run(
        contrastive_cases.step_against,
        hf_dir=hf_dir,
        rows_file=rows_file,
        expected=reference,
        knobs=knobs_of("softmax"),
        micro_batch_size=1,
        parallel={},
        broken=True,
    )
    assert measured["loss"] <= LIMITS["loss"] and measured["gradients"] > 100 * LIMITS["gradients"]

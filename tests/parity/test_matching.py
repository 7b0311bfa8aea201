"""Image-text matching against transformers: its model, ALBEF's linear head on the last hidden state, negatives by hand.

Shape suffixes: M rows, D width of embeddings, E pairs, 2 classes.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from tests.evidence import record, row
from tests.parity import contrastive_cases
from tests.parity.reference import Reference, load_reference, processor_inputs
from tests.parity.test_contrastive import CAPTIONS, WIDTH, embedding, rows_file, with_head

LIMITS = {"loss": 1e-5, "gradients": 1e-5}
HEADS = ("embedding_head.weight", "logit_scale", "logit_bias", "itm_head.weight", "itm_head.bias")
COEFFICIENT, MATCH_PROMPT = 0.4, "what is in this image?"
SEED, STEP = 1234, 1
"""Of the recipe, and of the first step."""

__all__ = ["rows_file"]


def with_both_heads(hf_dir, out_dir):
    """A copy of a directory with a head for embeddings and one for matches."""
    with_head(hf_dir, out_dir, {"logit_scale": 2.3, "logit_bias": 0.0})
    weights = load_file(out_dir / "model.safetensors")
    generator = torch.Generator().manual_seed(6)
    weights["itm_head.weight"] = torch.randn(2, weights["embedding_head.weight"].shape[1], generator=generator)
    weights["itm_head.bias"] = torch.tensor([0.3, -0.2])
    save_file(weights, out_dir / "model.safetensors", metadata={"format": "pt"})
    return out_dir


def partners(logits_MM, negatives, kind):
    """For each row the column that it is told from: the largest, or a draw by softmax; never its own."""
    found = []
    for number, logits_M in enumerate(logits_MM.detach().double().numpy()):
        scores_M = logits_M.copy()
        if negatives == "sampled":
            raw = np.random.PCG64([SEED, STEP, kind, number]).random_raw(len(CAPTIONS))
            scores_M -= np.log(-np.log(((raw >> np.uint64(11)) + 0.5) / 2**53))
        scores_M[number] = -math.inf
        found.append(int(scores_M.argmax()))
    return found


def match_logits(hf_dir, model, heads, folder, shown, said):
    """Of the images of one row with the caption of another: two classes at the last token of the question."""
    sizes, caption = CAPTIONS[shown][2], CAPTIONS[said][1]
    line_break = "" if hf_dir.name == "llava" else "\n"  # LLaVA's template prints it
    text = f"{line_break}{caption}\n{MATCH_PROMPT}"
    asked = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": text}]
    files = [folder / f"{shown}-{image}.png" for image in range(len(sizes))]
    inputs = processor_inputs(hf_dir, [{"role": "user", "content": asked}], files, asks=True)
    hidden_1SH = model.model(**inputs).last_hidden_state
    return F.linear(hidden_1SH[0, -1], heads["itm_head.weight"], heads["itm_head.bias"])


def whole_batch(hf_dir, folder, negatives):
    """Loss, gradients, and the share of pairs that are told rightly, of all rows at once."""
    model = load_reference(hf_dir)
    weights = load_file(hf_dir / "model.safetensors")
    heads = {name: weights[name].clone().requires_grad_() for name in HEADS}
    images, texts = [], []
    for number, (question, caption, sizes) in enumerate(CAPTIONS):
        shown = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": question}]
        files = [folder / f"{number}-{image}.png" for image in range(len(sizes))]
        head = heads["embedding_head.weight"]
        images.append(embedding(hf_dir, model, head, [{"role": "user", "content": shown}], files))
        said = [{"type": "text", "text": caption}]
        texts.append(embedding(hf_dir, model, head, [{"role": "user", "content": said}], []))
    logits_MM = heads["logit_scale"].exp() * torch.stack(texts) @ torch.stack(images).T
    rows = range(len(CAPTIONS))
    pairs = [(row, row) for row in rows]
    pairs += list(zip(rows, partners(logits_MM.T, negatives, 0), strict=True))
    pairs += list(zip(partners(logits_MM, negatives, 1), rows, strict=True))
    logits_E2 = torch.stack([match_logits(hf_dir, model, heads, folder, *pair) for pair in pairs])
    labels_E = torch.tensor([int(shown == said) for shown, said in pairs])
    loss = COEFFICIENT * image_text_contrastive_loss(logits_MM) + F.cross_entropy(logits_E2, labels_E)
    loss.backward()
    learned = dict(model.named_parameters()) | heads
    gradients = {name: None if one.grad is None else one.grad.clone() for name, one in learned.items()}
    return Reference(torch.zeros(0), loss.item(), gradients), (logits_E2.argmax(1) == labels_E).float().mean().item()


@pytest.fixture(scope="module")
def expected(model_dirs, rows_file, tmp_path_factory):
    """Directory, reference and share of (family, choice of negatives), made once."""
    done = {}

    def reference_of(family, negatives):
        if (family, negatives) not in done:
            hf_dir = with_both_heads(model_dirs[family], tmp_path_factory.mktemp("heads") / family)
            done[family, negatives] = hf_dir, *whole_batch(hf_dir, rows_file.parent, negatives)
        return done[family, negatives]

    return reference_of


@pytest.mark.parametrize(
    ("num_ranks", "micro_batch_size", "parallel"),
    [
        (1, 4, {}),
        (2, 1, {}),
        (2, 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (2, 2, {"context_parallel_size": 2}),
    ],
)
@pytest.mark.parametrize(("family", "negatives"), [("qwen3_vl", "sampled"), ("llava", "hardest")])
def test_a_step_is_that_of_the_whole_batch(
    family, negatives, num_ranks, micro_batch_size, parallel, expected, rows_file, workers
):
    hf_dir, reference, accuracy = expected(family, negatives)
    ranks = workers(num_ranks).run(
        contrastive_cases.step_against,
        hf_dir=hf_dir,
        rows_file=rows_file,
        expected=reference,
        knobs={"embedding_dim": WIDTH},
        micro_batch_size=micro_batch_size,
        parallel=parallel,
        matching={"negatives": negatives, "contrastive_coeff": COEFFICIENT, "match_prompt": MATCH_PROMPT},
    )
    figures = {name: max(rank[name] for rank in ranks) for name in LIMITS}
    layout = ", ".join(f"{name} {value}" for name, value in parallel.items()) or f"DP{num_ranks}"
    record(
        "parity",
        [
            row(
                f"{family}, matching {negatives}, {layout}, micro batch {micro_batch_size}: {name}",
                value,
                unit="relative difference" + (", worst parameter" if name == "gradients" else ""),
                required=f"<= {LIMITS[name]:g}",
                reference="transformers with a linear head, the loss of the whole batch by autograd",
                reference_value=0.0,
                command="make test TESTS=tests/parity",
            )
            for name, value in figures.items()
        ],
    )
    assert all(value <= LIMITS[name] for name, value in figures.items()), (figures, ranks[0]["worst parameter"])
    assert [rank["accuracy"] for rank in ranks] == pytest.approx([accuracy] * num_ranks)
    unused = {name for name in ranks[0]["unused there"] if "output_layer" in name}
    assert unused == {"language.output_layer.logit_bias"} and ranks[0]["compared"] > 20


def test_other_negatives_would_be_missed(expected, rows_file, workers):
    hf_dir, reference, _ = expected("qwen3_vl", "sampled")
    (measured,) = workers(1).run(
        contrastive_cases.step_against,
        hf_dir=hf_dir,
        rows_file=rows_file,
        expected=reference,
        knobs={"embedding_dim": WIDTH},
        micro_batch_size=1,
        parallel={},
        matching={"negatives": "hardest", "contrastive_coeff": COEFFICIENT, "match_prompt": MATCH_PROMPT},
    )
    assert measured["loss"] > 10 * LIMITS["loss"] and measured["gradients"] > 100 * LIMITS["gradients"]

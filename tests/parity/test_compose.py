"""`megavlm compose`: what it writes is a model that transformers loads, and that is equal to it here."""

import contextlib
import io
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from tests.parity import cases
from tests.parity.cases import TOLERANCES
from tests.parity.reference import amplify_vision, load_reference, reference
from tests.parity.test_families import conversation_inputs
from tests.tiny_parts import write_tiny_clip, write_tiny_decoder, write_tiny_siglip


def run_command(words: list[str]) -> tuple[int, str]:
    """Run a command line in a worker: exit code, and what it says."""
    from megavlm.cli.main import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        return main(words), said.getvalue()


@pytest.fixture
def compose(workers):
    """Runs the command; returns the error, empty when there is none."""

    def run(*words: object) -> str:
        code, said = workers(1).run(run_command, words=["compose", *map(str, words)])[0]
        assert code in (0, 2), said
        return said if code else ""

    return run


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("parts") / "clip")


@pytest.mark.parametrize(
    ("kind", "tie"),
    [("llama", False), ("mistral", False), ("qwen2", True), ("qwen3", False)],
    ids=lambda value: str(value),
)
def test_llava_of_any_decoder_equals_transformers(kind, tie, clip, rows_file, tmp_path, workers, compose):
    language = write_tiny_decoder(tmp_path / "language", kind, tie=tie)
    out = tmp_path / "out"
    assert compose("--vision", clip, "--language", language, "--out", out) == ""
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    amplify_vision(out)
    items = workers(1).run(cases.encode_rows, hf_dir=out, rows_file=rows_file)[0]
    inputs = [conversation_inputs(out, rows_file, number) for number in range(len(items))]
    for item, arguments in zip(items, inputs, strict=True):
        assert item.encoded.tokens_S.tolist() == arguments["input_ids"][0].tolist()
    rows = {"real": (items, reference(load_reference(out), items, inputs))}
    for parallel in ({}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}):
        ranks = workers(parallel.get("tensor_model_parallel_size", 1)).run(
            cases.compare, hf_dir=out, rows=rows, parallel=parallel
        )
        for rank in ranks:
            for figure in ("logits", "loss", "gradients"):
                assert rank["real"][figure] <= TOLERANCES[figure], rank["real"]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("layer", [-1, -2])
def test_siglip_equals_transformers(layer, whole, rows_file, tmp_path, workers, compose):
    siglip = write_tiny_siglip(tmp_path / "siglip", whole=whole)
    language = write_tiny_decoder(tmp_path / "language", "qwen2")
    out = tmp_path / "out"
    assert compose("--vision", siglip, "--language", language, "--out", out, "--feature-layer", layer) == ""
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    amplify_vision(out)
    items = workers(1).run(cases.encode_rows, hf_dir=out, rows_file=rows_file)[0]
    inputs = [conversation_inputs(out, rows_file, number) for number in range(len(items))]
    for item, arguments in zip(items, inputs, strict=True):
        assert item.encoded.tokens_S.tolist() == arguments["input_ids"][0].tolist()
    rows = {"real": (items, reference(load_reference(out), items, inputs))}
    (rank,) = workers(1).run(cases.compare, hf_dir=out, rows=rows, parallel={})
    for figure in ("logits", "loss", "gradients", "tower", "features"):
        assert rank["real"][figure] <= TOLERANCES[figure], rank["real"]
    report = workers(1).run(cases.round_trip, hf_dir=out, out_dir=tmp_path / "again", max_shard_bytes=2**30)[0]
    assert not report["one side only"] and not report["different"], report


def test_tensors_are_copied_and_new_rows_are_the_mean(clip, tmp_path, compose):
    language = write_tiny_decoder(tmp_path / "language", "llama", dtype=torch.float32)
    out = tmp_path / "out"
    assert compose("--vision", clip, "--language", language, "--out", out, "--image-token", "<picture>") == ""
    before, after = load_file(language / "model.safetensors"), load_file(out / "model.safetensors")
    vision = load_file(clip / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(out)
    image_token_id = tokenizer.convert_tokens_to_ids("<picture>")
    config = json.loads((out / "config.json").read_text())
    assert config["image_token_index"] == image_token_id == len(tokenizer) - 1
    assert config["text_config"]["vocab_size"] % 64 == 0
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = before[name], after[f"language_model.{name}"]
        assert torch.equal(new[: len(old)], old) and len(new) == config["text_config"]["vocab_size"] > len(old)
        torch.testing.assert_close(new[len(old) :], old.mean(dim=0).expand(len(new) - len(old), -1))
    others = [name for name in before if name not in ("model.embed_tokens.weight", "lm_head.weight")]
    assert all(torch.equal(after[f"language_model.{name}"], before[name]) for name in others)
    copied = [name for name in after if name.startswith("vision_tower.")]
    assert len(copied) == sum(name.startswith("vision_model.") for name in vision if "position_ids" not in name)
    assert all(torch.equal(after[name], vision[name.removeprefix("vision_tower.")]) for name in copied)


def test_the_template_takes_texts_and_parts(clip, tmp_path, compose):
    language = write_tiny_decoder(tmp_path / "language", "llama")
    out = tmp_path / "out"
    assert compose("--vision", clip, "--language", language, "--out", out) == ""
    old, new = AutoTokenizer.from_pretrained(language), AutoTokenizer.from_pretrained(out)
    plain = [{"role": "user", "content": "what number?"}, {"role": "assistant", "content": "7"}]
    assert old.apply_chat_template(plain, tokenize=False) == new.apply_chat_template(plain, tokenize=False)
    parts = [{"type": "image"}, {"type": "text", "text": "what "}, {"type": "text", "text": "number?"}]
    text = new.apply_chat_template([{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>what number?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "words",
    [
        ("pixel_shuffle_mlp", "scale_factor=2"),
        ("perceiver", "num_queries=3", "num_hidden_layers=1", "num_attention_heads=4", "num_key_value_heads=2"),
        ("gated_cross_attention", "num_queries=3", "num_hidden_layers=1", "cross_layer_interval=2"),
        ("qformer", "num_queries=3", "num_hidden_layers=2", "hidden_size=24", "num_attention_heads=3"),
    ],
    ids=lambda words: words[0],
)
def test_other_connectors_are_models_that_load(words, tmp_path, rows_file, workers, compose):
    clip = write_tiny_clip(tmp_path / "clip", whole=False)
    language = write_tiny_decoder(tmp_path / "language", "qwen3")
    out = tmp_path / "out"
    kind, *keys = words
    assert compose("--vision", clip, "--language", language, "--out", out, "--connector", kind, *keys) == ""
    report = workers(1).run(cases.round_trip, hf_dir=out, out_dir=tmp_path / "again", max_shard_bytes=2**30)[0]
    assert not report["one side only"] and not report["different"], report
    items = workers(1).run(cases.encode_rows, hf_dir=out, rows_file=rows_file)[0]
    assert any(len(item.patches_PC) for item in items)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--connector", "linear"), "connector_config type: got 'linear'"),
        (("--connector", "perceiver", "num_latents=4"), "got num_latents; expected keys among num_queries"),
        (
            ("--connector", "gated_cross_attention", "cross_layer_interval=0"),
            "connector_config cross_layer_interval: got 0; expected at least 1",
        ),
        (("--feature-layer", "-9"), "vision_feature_layer: got -9"),
        (("--image-token", "a b'"), "--image-token"),
    ],
)
def test_mistakes_leave_nothing_behind(words, message, clip, tmp_path, compose):
    language = write_tiny_decoder(tmp_path / "language", "llama")
    said = compose("--vision", clip, "--language", language, "--out", tmp_path / "out", *words)
    assert message in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    assert {path.name for path in tmp_path.iterdir()} <= {"language", "out"}

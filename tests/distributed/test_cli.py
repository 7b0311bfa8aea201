"""Commands end to end, and the words that help and README promise."""

import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.tiny import FAMILIES as FAMILIES_OF_EXAMPLES
from examples.tiny import write as write_example
from megavlm.cli import main as frame
from megavlm.data.rows import Rows
from megavlm.evaluate.transformers_generate import generate_answers, load_checked, model_inputs
from tests.distributed.running import (
    REPO_DIR,
    Inputs,
    call,
    check_intact,
    checkpoints,
    log_rows,
    losses,
    succeed,
    the_error,
)
from tests.pool import PoolKeeper
from tests.videos import write_video

FAMILIES = ["qwen3_vl", "llava", "qwen3_vl_moe"]
NUM_NEW_TOKENS = 8


def shown_commands(text: str) -> list[list[str]]:
    """Every `megavlm ...` of a text as words, whatever stands in front of it and behind a pipe."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in joined.splitlines():
        words = shlex.split(line.partition(" | ")[0], comments=True) if "megavlm " in line else []
        if "-m" in words and words[words.index("-m") + 1] == "megavlm":
            words = words[words.index("-m") + 1 :]
        if words[:1] == ["megavlm"]:
            found.append(words[1:])
    return found


def check_parses(words: list[str]) -> None:
    """The command's own parser takes the words; recipes that are named are there, placeholders aside."""
    name, rest = words[0], words[1:]
    module = importlib.import_module(frame.COMMANDS[name])
    if name in frame.GROUPS:
        if rest == ["COMMAND", "--help"]:
            return
        name, module, rest = frame._member(name, module, rest)
    parser = frame._command_parser(name, module)
    if rest == ["--help"]:
        return
    args = parser.parse_intermixed_args(rest)
    if name == "train":
        assert args.recipe == "RECIPE.yaml" or (REPO_DIR / args.recipe).is_file(), words
        assert all("=" in override for override in args.overrides)


@pytest.mark.parametrize("name", frame.COMMANDS)
def test_the_examples_of_help_are_right(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main([name, "--help"]) == 0
    shown = shown_commands(capsys.readouterr().out.partition("example")[2])
    assert any(words[0] == name for words in shown)
    for words in shown:
        check_parses(words)


def test_the_commands_of_the_readme_are_right() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (REPO_DIR / "README.md").read_text(), re.DOTALL)
    shown = [words for block in blocks for words in shown_commands(block)]
    assert {words[0] for words in shown} >= {"doctor", "train", "convert", "generate"}
    for words in shown:
        check_parses(words)


@pytest.mark.parametrize("target", ["demo", "story", "test", "test-full", "check", "setup"])
def test_make_knows_the_target(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=REPO_DIR, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tools/setup_env.sh" in done.stdout


def test_the_commands_of_the_story_are_right() -> None:
    shown = shown_commands((REPO_DIR / "examples" / "story.sh").read_text())
    trained = [Path(words[1]).stem for words in shown if words[0] == "train"]
    assert trained == sorted(path.stem for path in (REPO_DIR / "examples" / "recipes").glob("story_*.yaml"))
    for words in shown:
        check_parses(words)


def native_logits(hf_dir: str, checkpoint: str, rows: str) -> tuple[list[int], torch.Tensor]:
    """In a worker: tokens and logits of the first row's prompt, from a checkpoint's weights."""
    from megavlm.checkpoint.convert import load_checkpoint_weights
    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.checkpoint.native import find_checkpoint
    from megavlm.data.encode import SampleEncoder
    from megavlm.data.images import read_image_spec
    from megavlm.data.packing import pack
    from megavlm.data.pixels import load_sample_patches
    from megavlm.data.tokens import Tokenizer
    from megavlm.train.single import build_single

    directory = HFDirectory(hf_dir)
    inputs = directory.architecture.inputs
    tokenizer = Tokenizer(hf_dir, inputs.image_token_id, inputs.has_borders)
    encoder = SampleEncoder(inputs, read_image_spec(hf_dir, inputs, 0, 0), tokenizer, 512)
    row = encoder.encode_prompt(Rows.open([rows])[0])
    sizes = {"sample_multiple": 1, "total_multiple": 1, "pad_token_id": 0, "patch_channels": inputs.patch_channels}
    batch = pack([row], load_sample_patches(row, encoder), **sizes)
    model = build_single(directory, "fp32")
    folder = find_checkpoint(Path(checkpoint), required=True)
    assert folder is not None
    load_checkpoint_weights(folder, directory, model.parts, model.groups)
    with torch.no_grad():
        return row.tokens_S.tolist(), model.logits(batch, torch.device("cpu"))


SHARDED = [
    "parallel.tensor_model_parallel_size=2",
    "parallel.sequence_parallel=true",
    "parallel.pipeline_model_parallel_size=2",
]


@pytest.mark.parametrize(
    "family",
    ["qwen2_5_vl", "internvl", "llava_next", "llava_onevision", "perceiver", "qformer", "gated_cross_attention"],
)
def test_every_family_trains(inputs: Inputs, workers: PoolKeeper, tmp_path: Path, family: str) -> None:
    words = inputs.train(tmp_path, "train.train_iters=1", f"model.hf_dir={inputs.model(family)}", "data.max_pixels=0")
    succeed(workers, 1, [*words, "--dry-run"])
    assert not (tmp_path / "run").exists()
    succeed(workers, 1, words)
    assert len(losses(tmp_path)) == 1


@pytest.fixture(scope="module")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.mark.parametrize("family", FAMILIES_OF_EXAMPLES)
def test_the_tiny_recipe_of_every_family_runs(
    workers: PoolKeeper, tmp_path: Path, tiny_root: Path, family: str
) -> None:
    write_example(family, tiny_root)
    rows = tiny_root / "data"
    words = ["train", str(REPO_DIR / f"examples/recipes/tiny_{family}.yaml"), f"output_dir={tmp_path}", "name=run"]
    words += [f"model.hf_dir={tiny_root / family}", f"data.train={rows}/train.jsonl", f"data.eval={rows}/heldout.jsonl"]
    words += ["train.train_iters=2", "train.eval_iters=1", "observe.report=false", "checkpoint.save_at_end=false"]
    succeed(workers, 2, [*words, "observe.tensorboard=false", "observe.progress=false"])
    assert len(losses(tmp_path)) == 2


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.next_core
def test_saves_beside_training_are_those_of_saves_in_between(
    inputs: Inputs, workers: PoolKeeper, tmp_path: Path, num_processes: int
) -> None:
    knobs = ["checkpoint.save_steps=1", "checkpoint.keep_last=0", "train.train_iters=4"]
    for name in ("false", "true"):
        succeed(workers, num_processes, inputs.train(tmp_path / name, *knobs, f"checkpoint.async_save={name}"))
        events = [row for row in log_rows(tmp_path / name) if row.get("event") == "save"]
        assert len(events) == 4 and all(row["seconds"] > 0 for row in events)
        assert checkpoints(tmp_path / name) == ["latest", *(f"step_{step:08d}" for step in range(1, 5))]
    assert losses(tmp_path / "true") == losses(tmp_path / "false")
    for step in (1, 2, 3, 4):
        folders = [tmp_path / name / "run" / "checkpoints" / f"step_{step:08d}" for name in ("false", "true")]
        check_intact(folders[1])
        out, _ = succeed(workers, 1, ["convert", "diff", *map(str, folders)])
        assert out.startswith("equal")


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "num_processes", "layout"),
    [
        *((family, 1, []) for family in FAMILIES),
        ("qwen3_vl", 4, SHARDED),
        (
            "qwen3_vl_moe",
            4,
            [*SHARDED, "parallel.expert_model_parallel_size=2", "parallel.expert_tensor_parallel_size=1"],
        ),
    ],
)
@pytest.mark.next_core
def test_what_was_trained_is_exported_and_loads_in_transformers(
    inputs: Inputs, workers: PoolKeeper, tmp_path: Path, family: str, num_processes: int, layout: list[str]
) -> None:
    hf_dir, rows = str(inputs.model(family)), str(inputs.rows)
    words = inputs.train(tmp_path, "train.train_iters=2", f"model.hf_dir={hf_dir}", "optimizer.lr=1e-2", *layout)
    succeed(workers, num_processes, words)
    native, exported = str(tmp_path / "run" / "checkpoints"), str(tmp_path / "exported")
    words = ["convert", "export", "--checkpoint", native, "--hf-dir", hf_dir, "--out", exported]
    succeed(workers, 1, words)

    [(tokens, logits)] = workers(1).run(native_logits, hf_dir=hf_dir, checkpoint=native, rows=rows)
    model = load_checked(exported)  # refuses missing and unexpected keys
    arguments = prompt_arguments(exported, rows, model)
    assert arguments["input_ids"][0].tolist() == tokens
    torch.testing.assert_close(model(**arguments).logits[0], logits.view(len(tokens), -1), rtol=0, atol=1e-5)
    untrained = load_checked(hf_dir)(**arguments).logits[0]
    assert (untrained - logits.view(len(tokens), -1)).abs().max() > 1e-2

    # A second export has nowhere to go.
    [(code, _, err)] = workers(1).run(call, words=words)
    assert code == 2
    the_error(err, exported, "not empty")


def prompt_arguments(hf_dir: str, rows: str, model: Any) -> dict[str, Any]:
    """The first row's prompt as transformers' own tokenizer and image processor make it."""
    from transformers import AutoImageProcessor, AutoTokenizer

    processor = AutoImageProcessor.from_pretrained(hf_dir)
    return model_inputs(Rows.open([rows])[:1], AutoTokenizer.from_pretrained(hf_dir), processor, model)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2_5_vl", "internvl", "llava_next", "llava_onevision"])
def test_generate_answers_as_transformers_does(
    inputs: Inputs, workers: PoolKeeper, tmp_path: Path, family: str
) -> None:
    hf_dir = str(inputs.model(family))
    samples = list(Rows.open([str(inputs.rows)]))[:4]
    expected = generate_answers(hf_dir, samples, NUM_NEW_TOKENS)
    assert len(set(expected)) > 1 and all(expected), "answers that are all alike would prove little"
    imported = str(tmp_path / "native")
    words = ["convert", "import", "--hf-dir", hf_dir, "--out", imported]
    succeed(workers, 1, words)
    check_intact(Path(imported) / "step_00000000")
    for number, sample in enumerate(samples):
        asked = ["generate", "--hf-dir", hf_dir, "--prompt", sample.turns[0].text]
        asked += ["--max-new-tokens", str(NUM_NEW_TOKENS)]
        asked += [word for image in sample.images for word in ("--image", image)]
        asked += ["--checkpoint", imported] if number % 2 else []
        out, _ = succeed(workers, 1, asked)
        assert out == expected[number] + "\n"


def answers_in_layout(words: list[str]) -> list[str]:
    """In a worker: greedy answers to the report's samples, in the layout of a recipe."""
    from megavlm.config.load import load_recipe
    from megavlm.train import answers
    from megavlm.train.state import build_state

    state = build_state(load_recipe(words[0], words[1:]))
    return answers.answer(state, answers.report_samples(state))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [
    ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    ["parallel.pipeline_model_parallel_size=2"],
    ["parallel.context_parallel_size=2"],
], ids=["TP2+SP", "PP2", "CP2"])  # fmt: skip
@pytest.mark.next_core
def test_answers_do_not_depend_on_the_layout(
    inputs: Inputs, workers: PoolKeeper, tmp_path: Path, family: str, layout: list[str]
) -> None:
    samples = list(Rows.open([str(inputs.rows)]))
    chosen = [samples[index] for index in (0, 3, 6, 9)]
    expected = generate_answers(str(inputs.model(family)), chosen, NUM_NEW_TOKENS)
    words = inputs.train(tmp_path, f"model.hf_dir={inputs.model(family)}", f"data.eval={inputs.rows}", *layout)[1:]
    words += ["data.max_pixels=0", "observe.report=true", "observe.num_report_samples=4"]
    words += [f"observe.report_max_new_tokens={NUM_NEW_TOKENS}"]
    assert workers(2).run(answers_in_layout, words=words) == [expected, expected]


def test_videos_end_to_end(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    """Training on them on two ranks, a question about one, and what a user reads when something is wrong with one."""
    write_video(tmp_path / "clip.mkv")
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "<video>what moves?"}, {"role": "assistant", "content": "a square"}]
    row = json.dumps({"messages": turns, "videos": ["clip.mkv"]})
    rows.write_text(f"{row}\n" * 4)
    few = ["data.fps_max_frames=4", "data.video_min_pixels=4096", "data.video_max_pixels=16384"]
    words = inputs.train(tmp_path, f"data.train=[{rows}]", "train.train_iters=2", "data.dataloader_num_workers=1", *few)
    succeed(workers, 2, words)
    assert sorted(losses(tmp_path)) == [1, 2]
    asked = ["generate", "--hf-dir", str(inputs.model("qwen3_vl")), "--max-new-tokens", "2", "--prompt", "what moves?"]
    with_video, _ = succeed(workers, 1, [*asked, "--video", str(tmp_path / "clip.mkv")])
    without, _ = succeed(workers, 1, asked)
    assert with_video != without
    code, _, err = workers(1).run(call, words=[*asked, "--video", str(tmp_path / "no.mkv")])[0]
    assert code == 2
    the_error(err, "--video", "no.mkv", "an existing video file")
    words = inputs.train(tmp_path / "llava", f"data.train=[{rows}]", f"model.hf_dir={inputs.model('llava')}")
    code, _, err = workers(1).run(call, words=words)[0]
    assert code == 2
    the_error(err, "rows.jsonl:1", "got a video", only=False)
    whole = (tmp_path / "clip.mkv").read_bytes()
    (tmp_path / "clip.mkv").write_bytes(whole[:200])
    words = inputs.train(tmp_path / "broken", f"data.train=[{rows}]", *few)
    code, _, err = workers(1).run(call, words=words)[0]
    assert code == 2
    the_error(err, "rows.jsonl:1", "clip.mkv", "unreadable video", only=False)

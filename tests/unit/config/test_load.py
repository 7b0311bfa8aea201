import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.config.load import dump_recipe, load_recipe, recipe_from_dict, recipe_to_dict
from megavlm.config.schema import Recipe
from megavlm.errors import UseError


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UseError) as caught:
        load_recipe(write(folder, text), overrides)
    found = str(caught.value)
    assert "\n" not in found
    for part in ("got ", "expected ", "fix: "):
        assert part in found
    return found


def test_file_then_overrides_then_defaults(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        name: first
        model: {hf_dir: models/tiny}
        data:
          train: rows.jsonl
        optimizer:
          lr: 1e-4        # YAML 1.1 reads this as text
          min_lr: 1
        train:
          train_iters: 10
          precision: fp32
        """,
    )
    recipe = load_recipe(path, ["train.train_iters=20", "parallel.sequence_parallel=true", "train.train_iters=30"])
    assert recipe.name == "first"
    assert recipe.data.train == ("rows.jsonl",)
    assert recipe.optimizer.lr == 1e-4
    assert recipe.optimizer.min_lr == 1.0 and isinstance(recipe.optimizer.min_lr, float)
    assert recipe.train.train_iters == 30
    assert recipe.train.precision == "fp32"
    assert recipe.parallel.sequence_parallel is True
    assert recipe.checkpoint == Recipe().checkpoint
    assert recipe.model.hf_dir == "models/tiny"


@pytest.mark.parametrize(
    ("override", "section", "name", "expected"),
    [
        ("data.train=[a.jsonl,b.jsonl]", "data", "train", ("a.jsonl", "b.jsonl")),
        ("data.train=a.jsonl", "data", "train", ("a.jsonl",)),
        ("data.train=", "data", "train", ()),
        ("data.image_dir=C: odd #name", "data", "image_dir", "C: odd #name"),
        ("model.hf_dir=123", "model", "hf_dir", "123"),
        ("model.hf_dir='a=b'", "model", "hf_dir", "a=b"),
        ("optimizer.lr=1e-4", "optimizer", "lr", 1e-4),
        ("optimizer.lr=3", "optimizer", "lr", 3.0),
        ("optimizer.vit_lr=-1", "optimizer", "vit_lr", -1.0),
        ("train.precision=fp32", "train", "precision", "fp32"),
        ("parallel.recompute_granularity=none", "parallel", "recompute_granularity", "none"),
        ("parallel.pipeline_model_parallel_layout=Et*3|(tt|)*2,tL", "parallel", "pipeline_model_parallel_layout",
         "Et*3|(tt|)*2,tL"),
        ("observe.report=false", "observe", "report", False),
    ],
)  # fmt: skip
def test_override_values(tmp_path: Path, override: str, section: str, name: str, expected: object) -> None:
    recipe = load_recipe(write(tmp_path, "name: a"), [override])
    value = recipe_to_dict(recipe)[section][name]
    value = tuple(value) if isinstance(value, list) else value
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train:\n  lr: 1.0", ["train.lr", "unknown key", "did you mean optimizer.lr?"]),
        ("tensor_model_parallel_size: 2", ["did you mean parallel.tensor_model_parallel_size?"]),
        ("trian: {}", ["trian", "did you mean train?"]),
        ("train: {train_itres: 3}", ["train.train_itres", "did you mean train.train_iters?"]),
        ("data: {global-batch-size: 3}", ["did you mean train.global_batch_size?"]),
        ("parallel: {cuda_graph_impl: local}", ["parallel.cuda_graph_impl", "not offered", "other borders each time"]),
        ("parallel: {use_megatron_fsdp: true}", ["parallel.use_megatron_fsdp", "not offered", "distributed optimizer"]),
        ("zzzz: 1", ["zzzz", "one of name, description, output_dir, model"]),
        ("1: 2", ["1", "unknown key"]),
        ("train: {seed: fast}", ["train.seed", "'fast' (text)", "a whole number"]),
        ("train: {seed: true}", ["train.seed", "True (bool)", "a whole number"]),
        ("train: {seed: 100.0}", ["100.0 (float)", "write train.seed: 100"]),
        ("optimizer: {lr: true}", ["optimizer.lr", "True (bool)", "a number"]),
        ("optimizer: {lr: 1e-4x}", ["optimizer.lr", "'1e-4x' (text)"]),
        ("optimizer: {lr: [1]}", ["optimizer.lr", "[1] (list)"]),
        ("optimizer: {lr: }", ["optimizer.lr", "got nothing"]),
        ("observe: {report: 1}", ["observe.report", "1 (int)", "true or false"]),
        ('observe: {report: "true"}', ["observe.report", "'true' (text)"]),
        ("name: 7", ["name", "7 (int)", 'name: "7"']),
        ("name: 2026-02-01", ["name", "text", 'name: "2026-02-01"']),
        ("train: {precision: fp64}", ["train.precision", "'fp64'", "one of fp32, bf16, fp16"]),
        ("parallel: {recompute_granularity: null}", ["got nothing", "one of none, full, selective"]),
        ("data: {train: {a: 1}}", ["data.train", "(mapping)", "a list"]),
        ("data: {train: [a.jsonl, 3]}", ["data.train[1]", "3 (int)", "text"]),
        ("train:", ["train", "got nothing", "a section with keys"]),
        ("train: 3", ["train", "3 (int)", "a section with keys"]),
        ("- a\n- b", ["(list)"]),
        ("", ["an empty file"]),
        ("# only a comment", ["an empty file"]),
    ],
)
def test_wrong_content_names_file_key_and_fix(tmp_path: Path, text: str, parts: list[str]) -> None:
    found = message(tmp_path, text)
    for part in [str(tmp_path / "recipe.yaml"), *parts]:
        assert part in found


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train:\n  seed: 1\n  seed: 2", ["line 3", "`seed`", "line 2"]),
        ("name: a\ntrain: {}\nname: b", ["line 3", "`name`", "line 1"]),
        ("name: a\ntrain:\n  seed: 1\n   precision: bf16", ["line 4"]),
        ("name: [a, b", ["line 1"]),
        ("name: a\n---\nname: b", ["line 2"]),
        ("? [a]\n: b", ["line 1"]),
        ("name: 2026-02-31", ["YAML mistake"]),
        ("name: a\x00b", ["YAML mistake"]),
    ],
)
def test_wrong_yaml_names_the_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    found = message(tmp_path, text)
    for part in ["recipe.yaml", *parts]:
        assert part in found


def test_merge_keys_may_be_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  <<: {seed: 1, train_iters: 5}\n  seed: 2\n")
    recipe = load_recipe(path)
    assert (recipe.train.seed, recipe.train.train_iters) == (2, 5)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.seed", ["override `train.seed`", "no `key=value`"]),
        ("=3", ["no `key=value`"]),
        ("train=3", ["a section", "train.<key>=value"]),
        ("train.seed=abc", ["override `train.seed=abc`", "train.seed", "'abc' (text)"]),
        ("train.seed=[1", ["override `train.seed=[1`", "YAML mistake"]),
        ("optimizer.train_iters=3", ["optimizer.train_iters", "did you mean train.train_iters?"]),
        ("trian.seed=3", ["trian.seed", "did you mean train.seed?"]),
        ("train.seed.deep=3", ["train.seed.deep", "unknown key"]),
        ("data.train=[1,b]", ["data.train[0]", "1 (int)"]),
        ("train.seed=", ["train.seed", "got nothing"]),
    ],
)
def test_wrong_override_names_itself(tmp_path: Path, override: str, parts: list[str]) -> None:
    found = message(tmp_path, "name: a", override)
    for part in parts:
        assert part in found


def test_a_broken_section_is_reported_even_when_overridden(tmp_path: Path) -> None:
    assert "3 (int)" in message(tmp_path, "train: 3", "train.seed=1")


def test_missing_file_folder_and_binary(tmp_path: Path) -> None:
    with pytest.raises(UseError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UseError, match="a folder"):
        load_recipe(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(UseError, match="not text at offset 6"):
        load_recipe(tmp_path / "bytes.yaml")


def test_recipe_from_dict_checks_like_a_file() -> None:
    assert recipe_from_dict({"train": {"seed": 7}}).train.seed == 7
    with pytest.raises(UseError, match="checkpoint/recipe.json: train.sead"):
        recipe_from_dict({"train": {"sead": 7}}, "checkpoint/recipe.json")


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], max_codepoint=0xFFFD), max_size=12)
SCALARS = {
    bool: st.booleans(),
    int: st.integers(-(2**70), 2**70),
    float: st.floats(allow_nan=False),
    str: TEXT | st.sampled_from(["1e-5", "null", "yes", "0x1f", "1:30", "a: b", "#", "~", "2026-02-01", "<<"]),
}


def recipes(section: type) -> st.SearchStrategy[object]:
    parts = {}
    for item in fields(section):  # type: ignore[arg-type]
        hint = get_type_hints(section)[item.name]
        if is_dataclass(hint):
            parts[item.name] = recipes(hint)  # type: ignore[arg-type]
        elif get_origin(hint) is Literal:
            parts[item.name] = st.sampled_from(get_args(hint))
        elif get_origin(hint) is tuple:
            kind = get_args(hint)[0]
            items = recipes(kind) if is_dataclass(kind) else SCALARS[kind]
            parts[item.name] = st.lists(items, max_size=3).map(tuple)
        else:
            parts[item.name] = SCALARS[hint]
    return st.builds(section, **parts)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(recipe=recipes(Recipe))
def test_dump_round_trips(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.mktemp("dump") / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


def test_dump_is_complete_and_in_order() -> None:
    tree = yaml.safe_load(dump_recipe(Recipe()))
    assert list(tree) == [item.name for item in fields(Recipe)]
    assert tree["optimizer"]["lr"] == 1e-5
    assert tree["data"]["train"] == []


def test_loading_and_validating_import_neither_torch_nor_megatron(tmp_path: Path) -> None:
    hf_dir = tmp_path / "hf"
    hf_dir.mkdir()
    (hf_dir / "config.json").write_text('{"model_type": "qwen3_vl"}')
    (tmp_path / "rows.jsonl").write_text("{}\n")
    path = write(tmp_path, f"model: {{hf_dir: {hf_dir}}}\ndata: {{train: {tmp_path}/rows.jsonl}}")
    code = """
import sys
from megavlm.config.load import load_recipe
from megavlm.config.validate import validate_layout, validate_recipe
recipe = load_recipe(sys.argv[1], ["train.train_iters=1"])
validate_recipe(recipe)
assert validate_layout(recipe, 8) == 8
heavy = {"torch", "megatron", "transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_list_of_sections() -> None:
    phases = "[{instruction: 1, special: 1}, {from_progress: 0.5, box: 2}]"
    tree = {"data": {"token_weight_schedule": yaml.safe_load(phases)}}
    recipe = recipe_from_dict(tree)
    first, second = recipe.data.token_weight_schedule
    assert (first.special, first.instruction, first.response, first.from_progress) == (1.0, 1.0, 1.0, 0.0)
    assert (second.instruction, second.box, second.from_progress) == (0.0, 2.0, 0.5)
    with pytest.raises(UseError, match=r"token_weight_schedule\[0\].*boxes: got an unknown key.*box"):
        recipe_from_dict({"data": {"token_weight_schedule": [{"boxes": 1}]}})
    with pytest.raises(UseError, match=r"token_weight_schedule\[0\]: .*got 3 \(int\); expected a section"):
        recipe_from_dict({"data": {"token_weight_schedule": [3]}})

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_type_hints

import pytest

from megavlm.config.facts import ModelFacts
from megavlm.config.load import load_recipe
from megavlm.config.schema import Recipe
from megavlm.config.validate import LEAST, validate_layout, validate_model, validate_recipe
from megavlm.errors import UseError

BASE = """
name: good
output_dir: {folder}/runs
model: {{hf_dir: "{folder}"}}
data: {{train: ["{folder}/rows.jsonl"]}}
train: {{train_iters: 10, global_batch_size: 8, micro_batch_size: 2}}
"""
FACTS = ModelFacts(
    num_layers=4,
    num_attention_heads=8,
    num_query_groups=2,
    head_dim=16,
    ffn_hidden_size=128,
    vision_num_layers=3,
    vision_num_attention_heads=4,
    vision_ffn_hidden_size=64,
    vocab_size=512,
    max_positions=4096,
)
EXPERTS = {"num_experts": 6, "expert_ffn_hidden_size": 30}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "recipe.yaml").write_text(BASE.format(folder=tmp_path))
    return tmp_path


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(folder / "recipe.yaml", overrides)


def check(text: str, parts: list[str]) -> None:
    assert "\n" not in text
    for part in ["got ", "expected ", "fix: ", *parts]:
        assert part in text


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.train_iters=0", "train.num_train_epochs=0.5"],
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
        ["parallel.tensor_model_parallel_size=4", "parallel.vision_tensor_model_parallel_size=1"],
        ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
        ["parallel.pipeline_model_parallel_size=2", "parallel.pipeline_model_parallel_layout=Et|tttL"],
        ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
        ["parallel.recompute_granularity=selective", "parallel.recompute_modules=[mlp,layernorm]"],
        ["optimizer.lr_decay_style=WSD", "optimizer.lr_wsd_decay_iters=5", "optimizer.lr_warmup_iters=5"],
        ["optimizer.freeze_vit=true", "optimizer.freeze_llm=true", "optimizer.aligner_lr=1e-3"],
        ["data.max_pixels=100", "data.min_pixels=100"],
        ["data.min_pixels=100"],
        ["data.template=vicuna", "data.too_long=cut_answer", "data.token_weights.instruction=0.5"],
        ["data.token_weight_schedule=[{instruction: 1, special: 1}, {from_progress: 0.5, box: 2}]"],
        ["model.hidden_dropout=0.1", "model.backend=flash"],
        ["model.backend=te", "train.precision=fp32"],
        ["model.backend=te", "parallel.context_parallel_size=2", "parallel.cp_comm_type=a2a"],
        ["model.backend=flash", "parallel.context_parallel_size=2"],
        ["model.backend=flash", "parallel.cp_comm_type=p2p"],
    ],
)
def test_good_recipes_pass(folder: Path, overrides: list[str]) -> None:
    validate_recipe(recipe_of(folder, *overrides))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["name=a/b"], ["name", "`a/b`", "plain folder name"]),
        (["name=.."], ["name", "`..`"]),
        (["name="], ["name", "``"]),
        (["name=-rf"], ["name", "`-rf`"]),
        (["output_dir="], ["output_dir", "nothing"]),
        (["model.hf_dir="], ["model.hf_dir", "nothing"]),
        (["model.hf_dir=Qwen/none"], ["model.hf_dir", "`Qwen/none`, which does not exist", "download"]),
        (["model.backend=flash", "train.precision=fp32"], ["model.backend", "bf16"]),
        (
            ["parallel.gradient_accumulation_fusion=true", "train.precision=fp8_emulated"],
            ["parallel.gradient_accumulation_fusion", "fp8_emulated"],
        ),
        (
            ["model.cross_entropy_loss_fusion=true", "train.stage=rm"],
            ["model.cross_entropy_loss_fusion", "train.stage rm"],
        ),
        (
            ["model.cross_entropy_loss_fusion=true", "train.stage=prm"],
            ["model.cross_entropy_loss_fusion", "train.stage prm"],
        ),
        (
            ["model.cross_entropy_loss_fusion=true", "train.stage=contrastive"],
            ["model.cross_entropy_loss_fusion", "train.stage contrastive", "embeddings in place of logits"],
        ),
        (["contrastive.embedding_dim=8"], ["contrastive", "train.stage sft", "train.stage=contrastive"]),
        (["train.stage=contrastive", "contrastive.embedding_dim=0"], ["contrastive.embedding_dim", "at least 1"]),
        (["train.stage=contrastive", "contrastive.temperature=1e-3"], ["contrastive.temperature", "at least 0.01"]),
        (["train.stage=contrastive", "contrastive.loss_type=hinge"], ["contrastive.loss_type", "softmax"]),
        (
            ["train.stage=contrastive", "train.global_batch_size=1", "train.micro_batch_size=1"],
            ["train.global_batch_size", "at least 2"],
        ),
        (["train.stage=contrastive", "data.too_long=cut_turns"], ["data.too_long", "are not cut"]),
        (["train.stage=contrastive", "data.template=llava_plain"], ["data.template", "prints questions"]),
        (["matching.negatives=hardest"], ["matching", "train.stage sft", "train.stage=matching"]),
        (["train.stage=contrastive", "matching.match_prompt=why"], ["matching", "train.stage contrastive"]),
        (["train.stage=matching", "matching.max_texts_per_image=0"], ["matching.max_texts_per_image", "at least 1"]),
        (["train.stage=matching", "matching.negatives=random"], ["matching.negatives", "sampled"]),
        (["train.stage=matching", "data.too_long=cut_turns"], ["data.too_long", "are not cut"]),
        (
            ["train.stage=matching", "train.global_batch_size=1", "train.micro_batch_size=1"],
            ["train.global_batch_size", "1 with train.stage matching"],
        ),
        (["train.stage=contrastive", "model.hidden_dropout=0.1"], ["model.hidden_dropout", "computed twice"]),
        (
            ["model.backend=flash", "parallel.context_parallel_size=2", "parallel.cp_comm_type=p2p"],
            ["parallel.cp_comm_type", "p2p with model.backend=flash", "all_gather", "model.backend=te"],
        ),
        (
            ["parallel.context_parallel_size=2", "parallel.cp_comm_type=a2a"],
            ["parallel.cp_comm_type", "a2a with model.backend=torch", "all_gather or p2p"],
        ),
        (["model.hidden_dropout=1"], ["model.hidden_dropout", "below 1"]),
        (["model.attention_dropout=0.1", "parallel.context_parallel_size=2"], ["model.attention_dropout", "context"]),
        (["model.hidden_dropout=0.1", "parallel.context_parallel_size=2"], ["model.hidden_dropout", "context"]),
        (["parallel.tensor_model_parallel_size=0"], ["parallel.tensor_model_parallel_size", "at least 1"]),
        (["parallel.virtual_pipeline_model_parallel_size=2"], ["virtual_pipeline", "without a pipeline"]),
        (["parallel.pipeline_model_parallel_layout=Et|tL"], ["pipeline_model_parallel_layout", "2 stages"]),
        (["parallel.sequence_parallel=true"], ["parallel.sequence_parallel", "tensor_model_parallel_size=2"]),
        (
            ["parallel.tensor_model_parallel_size=4", "parallel.vision_tensor_model_parallel_size=2"],
            ["vision_tensor_model_parallel_size", "0, 1 or tensor_model_parallel_size (4)"],
        ),
        (["parallel.overlap_param_gather=true"], ["overlap_param_gather", "overlap_grad_reduce false"]),
        (
            [
                "parallel.overlap_param_gather=true",
                "parallel.overlap_grad_reduce=true",
                "parallel.use_distributed_optimizer=false",
            ],
            ["overlap_param_gather", "use_distributed_optimizer false"],
        ),
        (
            ["parallel.recompute_modules=attention"],
            ["recompute_modules", "`attention`", "core_attn, mlp, moe, layernorm"],
        ),
        (["parallel.recompute_granularity=selective", "parallel.recompute_modules=[]"], ["an empty list"]),
        (["parallel.recompute_num_layers=2"], ["recompute_num_layers", "recompute_granularity=full"]),
        (["train.train_iters=0"], ["train.train_iters", "exactly one"]),
        (["train.num_train_epochs=1"], ["train.train_iters", "exactly one"]),
        (["train.micro_batch_size=3"], ["train.micro_batch_size", "divisor of global_batch_size 8", "1, 2, 4, 8"]),
        (["train.seed=-1"], ["train.seed", "at least 0"]),
        (["train.eval_steps=5"], ["train.eval_steps", "data.eval"]),
        (["train.eval_iters=5"], ["train.eval_iters", "data.eval"]),
        (["optimizer.lr_warmup_iters=1", "optimizer.lr_warmup_fraction=0.1"], ["at most one of the two"]),
        (["optimizer.lr_decay_style=WSD"], ["lr_wsd_decay_iters", "above 0 with WSD"]),
        (["optimizer.lr_wsd_decay_iters=5"], ["lr_wsd_decay_iters", "cosine"]),
        (["optimizer.lr_warmup_iters=11"], ["lr_warmup_iters", "11 steps", "a run of 10"]),
        (["optimizer.lr_warmup_fraction=1"], ["lr_warmup_fraction", "below 1"]),
        (["optimizer.lr=0"], ["optimizer.lr", "more than 0"]),
        (["optimizer.lr=.nan"], ["optimizer.lr", "finite"]),
        (["optimizer.min_lr=1"], ["optimizer.min_lr", "at most"]),
        (["optimizer.clip_grad=-1"], ["optimizer.clip_grad", "at least 0"]),
        (["optimizer.vit_lr=.inf"], ["optimizer.vit_lr", "finite"]),
        (
            ["optimizer.freeze_vit=true", "optimizer.freeze_aligner=true", "optimizer.freeze_llm=true"],
            ["all frozen"],
        ),
        (["optimizer.freeze_vit=true", "optimizer.vit_lr=1e-5"], ["optimizer.vit_lr", "freeze_vit true"]),
        (["optimizer.freeze_aligner=true", "optimizer.aligner_lr=1e-5"], ["optimizer.aligner_lr"]),
        (["data.train="], ["data.train", "nothing"]),
        (["data.train=[none.jsonl]"], ["data.train[0]", "`none.jsonl`, which does not exist", "relative to"]),
        (["data.eval=/none.jsonl"], ["data.eval[0]", "`/none.jsonl`", "correct the path"]),
        (["data.image_dir=none"], ["data.image_dir", "which does not exist"]),
        (["checkpoint.load_dir=none"], ["checkpoint.load_dir", "which does not exist"]),
        (["data.min_pixels=200", "data.max_pixels=100"], ["data.min_pixels", "at most data.max_pixels 100"]),
        (["data.augment_flip_probability=1.5"], ["data.augment_flip_probability", "at most 1"]),
        (["data.augment_crop_min_area=0"], ["data.augment_crop_min_area", "at least 0.01"]),
        (["data.image_backend=dali", "data.jpeg_draft=true"], ["data.jpeg_draft", "image_backend=dali"]),
        (["data.image_backend=pil", "data.dali_device=gpu"], ["data.dali_device", "image_backend=pil"]),
        (["data.max_image_pixels=178956971"], ["data.max_image_pixels", "at most 178956970"]),
        (["data.frames_fps=0"], ["data.frames_fps", "more than 0"]),
        (["data.root=none"], ["data.root", "which does not exist"]),
        (["data.root=model", "data.image_dir=."], ["data.image_dir", "outside of data.root `model`"]),
        (["data.max_length=1"], ["data.max_length", "at least 2"]),
        (["data.template=chatlm"], ["data.template", "`chatlm`", "chatml, vicuna, llama2, llava_plain, document"]),
        (["data.template=none.jinja"], ["data.template", "an existing .jinja file"]),
        (["data.token_weights.box=-1"], ["data.token_weights.box", "at least 0"]),
        (["data.token_weights.response=0"], ["data.token_weights", "all 0"]),
        (["data.token_weight_schedule=[{from_progress: 0.5}]"], ["schedule[0].from_progress", "0 in the first phase"]),
        (["data.token_weight_schedule=[{}, {from_progress: 1}]"], ["schedule[1].from_progress", "below 1"]),
        (["data.token_weight_schedule=[{}, {}]"], ["schedule[1].from_progress", "ascending"]),
        (["data.token_weight_schedule=[{response: 0}]"], ["schedule[0]", "all 0"]),
        (["data.token_weight_schedule=[{}]", "data.token_weights.box=1"], ["one of the two"]),
    ],
)
def test_contradictions_are_named(folder: Path, overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(UseError) as caught:
        validate_recipe(recipe_of(folder, *overrides))
    check(str(caught.value), parts)


def test_paths_of_the_wrong_kind(folder: Path) -> None:
    for names in (str(folder), f"{folder}/*.jsonl"):  # what is in it is found when rows are read
        validate_recipe(recipe_of(folder, f"data.train={names}"))
    with pytest.raises(UseError, match=r"data.train\[0\]: got .*none\*`, which does not exist; expected a file or"):
        validate_recipe(recipe_of(folder, f"data.train={folder}/none*"))
    with pytest.raises(UseError, match="model.hf_dir: got .*, a file; expected a directory"):
        validate_recipe(recipe_of(folder, f"model.hf_dir={folder}/rows.jsonl"))
    with pytest.raises(UseError, match="output_dir: got .*, a file"):
        validate_recipe(recipe_of(folder, f"output_dir={folder}/rows.jsonl"))


def test_every_number_of_the_schema_has_a_range() -> None:
    """A knob that is added to the schema must be given a least value here."""
    numbers = {
        f"{section}.{item.name}"
        for section, kind in get_type_hints(Recipe).items()
        if is_dataclass(kind)
        for item in fields(kind)
        if get_type_hints(kind)[item.name] in (int, float)
    }
    assert numbers == set(LEAST)


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        ([], 1, 1),
        ([], 4, 4),
        (["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"], 8, 2),
        (["parallel.context_parallel_size=4"], 8, 2),
        (["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"], 4, 2),
    ],
)
def test_data_parallel_size(folder: Path, overrides: list[str], world_size: int, expected: int) -> None:
    assert validate_layout(recipe_of(folder, *overrides), world_size) == expected


@pytest.mark.parametrize(
    ("overrides", "world_size", "parts"),
    [
        (
            ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"],
            6,
            ["world size", "6 processes", "a multiple of 4 (tensor 2 x pipeline 2 x context 1)", "start 4 or 8"],
        ),
        (["parallel.context_parallel_size=4"], 1, ["a multiple of 4", "start 4 processes"]),
        ([], 3, ["train.global_batch_size", "got 8", "a multiple of 6", "use 6 or 12", "a world size out of 1, 2, 4"]),
        (
            ["parallel.tensor_model_parallel_size=2", "train.micro_batch_size=4"],
            8,
            ["a multiple of 16", "use 16", "world size out of 2, 4"],
        ),
        (
            ["parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=2",
             "train.global_batch_size=12"],
            4,
            ["train.global_batch_size", "6 microbatches", "pipeline_model_parallel_size 4", "use 8 or 16"],
        ),
    ],
)  # fmt: skip
def test_layouts_that_do_not_divide(folder: Path, overrides: list[str], world_size: int, parts: list[str]) -> None:
    with pytest.raises(UseError) as caught:
        validate_layout(recipe_of(folder, *overrides), world_size)
    check(str(caught.value), parts)


@pytest.mark.parametrize(
    ("overrides", "world_size", "legal"),
    [
        (["parallel.expert_model_parallel_size=2"], 2, True),
        (["parallel.expert_model_parallel_size=2"], 1, False),
        (["parallel.expert_model_parallel_size=2", "parallel.context_parallel_size=2"], 2, True),
        (["parallel.expert_model_parallel_size=2", "parallel.tensor_model_parallel_size=2"], 2, False),
        (
            [
                "parallel.expert_model_parallel_size=2",
                "parallel.expert_tensor_parallel_size=1",
                "parallel.tensor_model_parallel_size=2",
            ],
            2,
            True,
        ),
        (["parallel.expert_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"], 2, False),
    ],
)
def test_ranks_for_experts(folder: Path, overrides: list[str], world_size: int, legal: bool) -> None:
    recipe = recipe_of(folder, *overrides)
    if legal:
        assert validate_layout(recipe, world_size) >= 1
        return
    with pytest.raises(UseError) as caught:
        validate_layout(recipe, world_size)
    check(str(caught.value), ["expert_model_parallel_size", "ranks of a pipeline stage", "fix:"])


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_models_that_fit(folder: Path, tensor: int) -> None:
    recipe = recipe_of(
        folder, f"parallel.tensor_model_parallel_size={tensor}", "parallel.pipeline_model_parallel_size=2"
    )
    validate_model(recipe, FACTS)  # 4 ranks over 2 key-value heads: a multiple of them
    one = recipe_of(folder, "parallel.tensor_model_parallel_size=8", "parallel.vision_tensor_model_parallel_size=1")
    validate_model(one, FACTS)


@pytest.mark.parametrize(
    ("overrides", "changes", "parts"),
    [
        (["parallel.tensor_model_parallel_size=3"], {}, ["got 3", "8 attention heads", "use one of 1, 2, 4"]),
        (["parallel.tensor_model_parallel_size=2"], {"ffn_hidden_size": 127}, ["127 feed-forward channels"]),
        (["parallel.tensor_model_parallel_size=2"], {"vocab_size": 511}, ["511 vocabulary rows", "one of 1"]),
        (
            ["parallel.tensor_model_parallel_size=2"],
            {"num_query_groups": 3, "num_attention_heads": 6},
            ["a divisor or a multiple of the model's 3 key-value heads"],
        ),
        (
            ["parallel.tensor_model_parallel_size=8"],
            {},
            ["4 vision attention heads", "use one of 1, 2, 4, or set parallel.vision_tensor_model_parallel_size=1"],
        ),
        (
            ["parallel.tensor_model_parallel_size=2"],
            {"vision_ffn_hidden_size": 63},
            ["63 vision feed-forward channels"],
        ),
        (["parallel.pipeline_model_parallel_size=3"], {}, ["3 stages", "4 decoder layers", "Et|t|ttL"]),
        (
            ["parallel.pipeline_model_parallel_size=2", "parallel.pipeline_model_parallel_layout=Et|tL"],
            {},
            ["the model's 4"],
        ),
        ([], {"max_positions": 2048}, ["data.max_length", "got 4096", "2048"]),
        (
            ["parallel.expert_model_parallel_size=2"],
            {},
            ["expert_model_parallel_size", "got 2", "no mixture-of-experts"],
        ),
        (["parallel.expert_tensor_parallel_size=1"], {}, ["expert_tensor_parallel_size", "no mixture-of-experts"]),
        (["model.moe_aux_loss_coeff=0.1"], {}, ["moe_aux_loss_coeff", "no mixture-of-experts"]),
        (["parallel.recompute_granularity=selective", "parallel.recompute_modules=moe"], {}, ["write mlp"]),
        (["parallel.expert_model_parallel_size=4"], EXPERTS, ["a divisor of the model's 6 experts", "1, 2, 3, 6"]),
        (
            ["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true"],
            EXPERTS,
            ["expert_tensor_parallel_size", "got 4", "an expert's 30 feed-forward channels"],
        ),
        (
            ["parallel.tensor_model_parallel_size=2"],
            EXPERTS,
            ["sequence_parallel", "set parallel.sequence_parallel=true"],
        ),
        (["parallel.recompute_granularity=selective", "parallel.recompute_modules=mlp"], EXPERTS, ["write moe"]),
    ],
)
def test_models_that_do_not_fit(folder: Path, overrides: list[str], changes: dict, parts: list[str]) -> None:
    with pytest.raises(UseError) as caught:
        validate_model(recipe_of(folder, *overrides), replace(FACTS, **changes))
    check(str(caught.value), parts)

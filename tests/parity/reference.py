"""The other side: transformers' model, sample by sample, in a process without Megatron-Core's adapter.

Shape suffixes: S tokens of a sample, T tokens of all samples, Y vocabulary, P patches, C values of a patch, D tower
hidden size, V visual tokens, K slots (1 + DeepStack features), H hidden size.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.vision_utils import get_vision_window_index

from tests.parity.rows import Item

ANYRES = ("llava_next", "llava_onevision")
QWEN = ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl")


@dataclass
class Reference:
    """What transformers makes of a packed row's samples, one after the other.

    `loss` is the weighted mean over all of them; `gradients` are its own, by parameter, None where there is none.
    """

    logits_TY: torch.Tensor
    loss: float = 0.0
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)
    tower_PD: torch.Tensor | None = None
    features_VKH: torch.Tensor | None = None


def amplify_vision(hf_dir: Path) -> Path:
    """Scale the matrices of tower and connector so that they keep the size of their input, and return `hf_dir`.

    As transformers initialises them, activations in a tiny tower stay where every GELU is a straight line, and logits
    hardly depend on the image: mistakes there would not show.
    """
    file = hf_dir / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and "language_model" not in name and "lm_head" not in name:
            tensors[name] = (tensor / (tensor.std() * tensor[0].numel() ** 0.5)).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return hf_dir


def load_reference(hf_dir: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as transformers builds it, attention written out."""
    model = AutoModelForImageTextToText.from_pretrained(hf_dir, attn_implementation="eager", dtype=dtype)
    return model.train(False)


def reference(
    model: PreTrainedModel, items: Sequence[Item], inputs: Sequence[dict[str, Any]] | None = None
) -> Reference:
    """Logits, loss, gradients and vision features of some samples.

    Args:
        model: from `load_reference`.
        items: the samples.
        inputs: transformers' arguments of each sample, where something else than the item's own arrays made them.
    """
    model.zero_grad()
    inputs = inputs or [model_inputs(model, item) for item in items]
    logits, loss_sums, weights = [], [], []
    for item, arguments in zip(items, inputs, strict=True):
        out_SY = model(**arguments).logits[0]
        logits.append(out_SY.detach().float())
        labels_S, weights_S = arguments["input_ids"][0], torch.from_numpy(item.encoded.loss_weights_S())
        losses = F.cross_entropy(out_SY[:-1].float(), labels_S[1:], reduction="none")
        loss_sums.append((losses * weights_S[1:]).sum())
        weights.append(weights_S[1:].sum())
    loss = torch.stack(loss_sums).sum() / torch.stack(weights).sum()
    loss.backward()
    result = Reference(torch.cat(logits), loss.item())
    result.gradients = {
        name: None if parameter.grad is None else parameter.grad.clone() for name, parameter in model.named_parameters()
    }
    if not any("pixel_values_videos" in arguments for arguments in inputs):  # it encodes them apart from the images
        _add_features(result, model, [arguments for arguments in inputs if "pixel_values" in arguments])
    return result


def model_inputs(model: PreTrainedModel, item: Item) -> dict[str, Any]:
    """A sample in the form that transformers takes."""
    tokens_1S = torch.from_numpy(item.encoded.tokens_S)[None]
    arguments: dict[str, Any] = {"input_ids": tokens_1S}
    if model.config.model_type in QWEN:
        arguments["mm_token_type_ids"] = (tokens_1S == model.config.image_token_id).int()
        if item.encoded.grids_thw:
            arguments |= {"pixel_values": item.patches_PC.to(model.dtype), "image_grid_thw": item.grid_thw_N3}
    elif item.encoded.grids_thw and model.config.model_type in ANYRES:
        arguments["pixel_values"] = _tiled_images(item).to(model.dtype)
        arguments["image_sizes"] = torch.tensor(item.image_sizes)
        if model.config.model_type == "llava_onevision":
            arguments["batch_num_images"] = torch.tensor([len(item.image_sizes)])
    elif item.encoded.grids_thw:
        arguments["pixel_values"] = _whole_images(item).to(model.dtype)
    return arguments


def processor_inputs(
    hf_dir: Path, messages: list[dict[str, Any]], images: Sequence[Path], asks: bool = False
) -> dict[str, Any]:
    """A conversation as transformers' own template, tokenizer and image processor make it; `asks` for an answer."""
    tokenizer = AutoTokenizer.from_pretrained(hf_dir)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
    pixels = [Image.open(path) for path in images]
    config = json.loads((hf_dir / "config.json").read_text())
    if config["model_type"] in ("llava", "llava_next"):
        processor = AutoProcessor.from_pretrained(hf_dir)
        arguments = processor(text=text, images=pixels or None, return_tensors="pt")
        return {name: arguments[name] for name in ("input_ids", "pixel_values", "image_sizes") if name in arguments}
    # The others' processors cannot be made without torchvision (for videos): what they do with images, step by step.
    if config["model_type"] == "internvl":
        return _internvl_inputs(hf_dir, tokenizer, text, pixels)
    if config["model_type"] == "llava_onevision":
        return _onevision_inputs(hf_dir, tokenizer, text, pixels)
    vision = AutoImageProcessor.from_pretrained(hf_dir)(images=pixels, return_tensors="pt") if pixels else {}
    image_token = tokenizer.convert_ids_to_tokens(config["image_token_id"])
    pieces = text.split(image_token)
    counts = [int(grid.prod()) // 4 for grid in vision["image_grid_thw"]] if pixels else []
    text = pieces[0] + "".join(image_token * n + piece for n, piece in zip(counts, pieces[1:], strict=True))
    tokens_1S = tokenizer(text, return_tensors="pt")["input_ids"]
    types = (tokens_1S == config["image_token_id"]).int()
    return {"input_ids": tokens_1S, "mm_token_type_ids": types, **vision}


def _internvl_inputs(hf_dir: Path, tokenizer: Any, text: str, pixels: list[Image.Image]) -> dict[str, Any]:
    """As InternVLProcessor: tiles, and borders around every image's placeholders."""
    vision: Any = {}
    if pixels:
        processor = AutoImageProcessor.from_pretrained(hf_dir)
        vision = processor(images=pixels, return_tensors="pt", crop_to_patches=True)
        counts = [4 * int(number) for number in vision.pop("num_patches")]
        pieces = text.split("<IMG_CONTEXT>")
        text = pieces[0] + "".join(
            f"<img>{'<IMG_CONTEXT>' * count}</img>{piece}" for count, piece in zip(counts, pieces[1:], strict=True)
        )
    return {"input_ids": tokenizer(text, return_tensors="pt")["input_ids"], **vision}


def _onevision_inputs(hf_dir: Path, tokenizer: Any, text: str, pixels: list[Image.Image]) -> dict[str, Any]:
    """As LlavaOnevisionProcessor, whose own arithmetic counts the tokens."""
    vision: Any = {}
    if pixels:
        settings = json.loads((hf_dir / "processor_config.json").read_text())
        processor = AutoImageProcessor.from_pretrained(hf_dir)
        vision = dict(processor(images=[pixels], return_tensors="pt"))
        counter = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
        vars(counter).update(
            image_processor=processor,
            image_token="<image>",
            num_image_tokens=settings["num_image_tokens"],
            vision_aspect_ratio=settings["vision_aspect_ratio"],
            vision_feature_select_strategy=settings["vision_feature_select_strategy"],
        )
        pieces = text.split("<image>")
        text = pieces[0] + "".join(
            counter.replace_image_token(vision, number) + piece for number, piece in enumerate(pieces[1:])
        )
    return {"input_ids": tokenizer(text, return_tensors="pt")["input_ids"], **vision}


def _tiled_images(item: Item) -> torch.Tensor:
    """Every image's tiles [images, most tiles, 3, height, width], empty ones at the end."""
    tiles = _whole_images(item).split([grid[0] for grid in item.encoded.grids_thw])
    most = max(len(each) for each in tiles)
    return torch.stack([F.pad(each, (0, 0) * 3 + (0, most - len(each))) for each in tiles])


def _whole_images(item: Item) -> torch.Tensor:
    """Patches row by row back to [images or tiles, 3, height, width]."""
    num_images, (_, rows, columns, *_) = sum(grid[0] for grid in item.encoded.grids_thw), item.encoded.grids_thw[0]
    side = int((item.patches_PC.shape[1] // 3) ** 0.5)
    patches = item.patches_PC.view(num_images, rows, columns, 3, side, side)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(num_images, 3, rows * side, columns * side)


@torch.no_grad()
def _add_features(result: Reference, model: PreTrainedModel, inputs: Sequence[dict[str, Any]]) -> None:
    towers, features = [], []
    for arguments in inputs:
        names = ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images")
        out = model.get_image_features(**{name: arguments[name] for name in names if name in arguments})
        slots = [torch.cat(list(out.pooler_output))]
        if model.config.model_type == "qwen2_5_vl":
            towers.append(_row_by_row(model, arguments["image_grid_thw"], out.last_hidden_state))
        elif model.config.model_type in ("qwen3_vl", "qwen3_vl_moe"):
            towers.append(out.last_hidden_state)
            slots += [torch.cat(list(feature)) for feature in out.deepstack_features]
        else:
            layer = model.config.vision_feature_layer
            hidden = out.last_hidden_state if model.config.model_type == "internvl" else out.hidden_states[layer]
            drops_first = model.config.vision_feature_select_strategy == "default"
            towers.append(hidden[:, int(drops_first) :].flatten(0, 1))
        features.append(torch.stack(slots, dim=1))
    if towers:
        result.tower_PD, result.features_VKH = torch.cat(towers).float(), torch.cat(features).float()


def _row_by_row(model: PreTrainedModel, grid_thw_N3: torch.Tensor, hidden_PD: torch.Tensor) -> torch.Tensor:
    """Undo the windows' order, in which Qwen2.5-VL's tower gives its last hidden state."""
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    order_V, _ = get_vision_window_index(
        grid_thw_N3, spatial_merge_size=merge, window_size=vision.window_size, patch_size=vision.patch_size
    )
    return hidden_PD.unflatten(0, (-1, merge**2))[order_V.argsort()].flatten(0, 1)

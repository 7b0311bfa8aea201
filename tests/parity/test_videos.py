"""Rows with videos: file to logits, gradients and a training step, against transformers."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from megavlm.data.sample import FrameFiles, VideoClip
from tests.evidence import record
from tests.parity import cases
from tests.parity.cases import TOLERANCES
from tests.parity.conftest import WRITERS
from tests.parity.reference import amplify_vision, load_reference, reference
from tests.parity.test_families import evidence_row
from tests.parity.test_layouts import LAYOUTS as STEP_LAYOUTS
from tests.parity.test_layouts import WORLDS
from tests.videos import moving_square, write_video

pytestmark = pytest.mark.next_core

FAMILIES = ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "llava_onevision")
LAYOUTS = {"TP1": {}, "TP2+SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}
NUM_FRAMES, FPS = 20, 8.0
PLACEHOLDERS = {"image": "image", "video": "video", "frames": "video"}
NUM_PICTURES, PICTURES_FPS = 5, 2.0  # of a video given as a list of pictures
PIXELS = {"qwen2_5_vl": (784, 6272), "qwen3_vl": (4096, 32768), "qwen3_vl_moe": (4096, 32768)}
# Content parts of the question, and the answer.
CONVERSATIONS = [
    (["video", "what moves?"], "a white square"),
    (["image", "before", "video", "and", "video", "after?"], "the blue circle"),
    (["the quick brown fox?"], "jumps"),
    (["image", "which number is this?"], "7"),
    (["frames", "which way?"], "left"),
]


@pytest.fixture(scope="module")
def video_dirs(tmp_path_factory):
    """Tiny models whose video processors make small frames."""
    root = tmp_path_factory.mktemp("video_models")
    found = {}
    for family in FAMILIES:
        hf_dir = amplify_vision(WRITERS[family](root / family))
        config = {"fps": 2.0, "max_frames": 5}
        if family in PIXELS:
            config["size"] = dict(zip(("shortest_edge", "longest_edge"), PIXELS[family], strict=True))
        else:
            side = json.loads((hf_dir / "config.json").read_text())["vision_config"]["image_size"]
            config["size"] = {"height": side, "width": side}
        (hf_dir / "video_preprocessor_config.json").write_text(json.dumps(config))
        found[family] = hf_dir
    return found


@pytest.fixture(scope="module")
def video_rows(tmp_path_factory):
    """The conversations as a user would write them."""
    root = tmp_path_factory.mktemp("video_rows")
    write_video(root / "wide.mp4", NUM_FRAMES, FPS, 96, 64)
    write_video(root / "high.webm", NUM_FRAMES, FPS, 48, 80, codec="libvpx")
    noise = np.random.default_rng(0).integers(0, 256, (40, 72, 3)).astype(np.uint8)
    Image.fromarray(noise).save(root / "noise.png")
    pictures = [f"frame{number}.png" for number in range(NUM_PICTURES)]
    for name, pixels in zip(pictures, moving_square(NUM_PICTURES, 80, 56), strict=True):
        Image.fromarray(pixels).save(root / name)
    lines = []
    for parts, answer in CONVERSATIONS:
        videos = [["wide.mp4", "high.webm"][number] for number in range(parts.count("video"))]
        videos += [pictures] * parts.count("frames")
        text = "".join(f"<{PLACEHOLDERS[part]}>" if part in PLACEHOLDERS else part for part in parts)
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        row = {"messages": messages, "images": ["noise.png"] * parts.count("image"), "videos": videos}
        lines.append(json.dumps(row))
    path = root / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def replacements(family, model, clip, grid):
    """What transformers' processor writes for a video's placeholder, and its further arguments."""
    config, metadata = model.config, VideoMetadata(NUM_FRAMES, fps=FPS, frames_indices=list(clip.frames))
    if isinstance(clip.path, FrameFiles):
        metadata = VideoMetadata(NUM_PICTURES, fps=PICTURES_FPS, frames_indices=list(range(NUM_PICTURES)))
    if family == "llava_onevision":
        side = -(-config.vision_config.image_size // config.vision_config.patch_size // 2)
        return "<video>" * (len(clip.frames) * side**2 + 1), {}
    inputs = {"video_grid_thw": torch.tensor([grid]), "video_metadata": [metadata]}
    processor = Qwen3VLProcessor.__new__(Qwen3VLProcessor)  # its constructor asks for torchvision
    vars(processor).update(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    if family == "qwen2_5_vl":
        text = "<|video_pad|>" * (grid[0] * grid[1] * grid[2] // 4)
        return text, {"second_per_grid_ts": [2 / metadata.sampled_fps]}
    return processor.replace_video_token(inputs, 0), {}


def frames_of(patches_PC, grid):
    """Patches row by row to [frames, 3, height, width]."""
    frames, rows, columns = grid[:3]
    side = int((patches_PC.shape[1] // 3) ** 0.5)
    patches = patches_PC.view(frames, rows, columns, 3, side, side).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(frames, 3, rows * side, columns * side)


def their_inputs(family, hf_dir, model, item, parts, answer):
    """A conversation by transformers' template, tokenizer and token arithmetic; pixels are ours."""
    tokenizer = AutoTokenizer.from_pretrained(hf_dir)
    content = [
        {"type": PLACEHOLDERS[part]} if part in PLACEHOLDERS else {"type": "text", "text": part} for part in parts
    ]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    grids, sources = item.encoded.grids_thw, item.encoded.images
    each = item.patches_PC.split([grid[0] * grid[1] * grid[2] for grid in grids])
    images = [number for number, source in enumerate(sources) if isinstance(source, str)]
    videos = [number for number, source in enumerate(sources) if isinstance(source, VideoClip)]
    ids = {"image": model.config.image_token_id, "video": model.config.video_token_id}
    names = {kind: tokenizer.convert_ids_to_tokens(token_id) for kind, token_id in ids.items()}
    arguments = {}
    if images and family == "llava_onevision":
        tiles = frames_of(each[images[0]], grids[images[0]])
        arguments |= {"pixel_values": tiles[None], "image_sizes": torch.tensor(item.image_sizes)}
        arguments["batch_num_images"] = torch.tensor([1])
        features = model.get_image_features(**arguments).pooler_output
        image_texts = [names["image"] * len(features[0])]
    elif images:
        arguments["pixel_values"] = torch.cat([each[number] for number in images])
        arguments["image_grid_thw"] = torch.tensor([grids[number] for number in images])
        image_texts = [names["image"] * (grids[n][1] * grids[n][2] // 4) for n in images]
    video_texts = []
    for number in videos:
        video_text, more = replacements(family, model, sources[number], grids[number])
        video_texts.append(video_text)
        for key, values in more.items():
            arguments[key] = [*arguments.get(key, []), *values]
    if "second_per_grid_ts" in arguments:
        arguments["second_per_grid_ts"] = torch.tensor(arguments["second_per_grid_ts"])
    if videos and family == "llava_onevision":
        arguments["pixel_values_videos"] = torch.stack([frames_of(each[n], grids[n]) for n in videos])
    elif videos:
        arguments["pixel_values_videos"] = torch.cat([each[number] for number in videos])
        arguments["video_grid_thw"] = torch.tensor([grids[number] for number in videos])
    waiting = {"image": iter(image_texts if images else []), "video": iter(video_texts)}
    for kind, name in names.items():
        text = re.sub(re.escape(name), lambda _, kind=kind: next(waiting[kind]), text)
    tokens_1S = tokenizer(text, return_tensors="pt")["input_ids"]
    if family != "llava_onevision":
        config = model.config
        arguments["mm_token_type_ids"] = (tokens_1S == config.image_token_id) + 2 * (tokens_1S == config.video_token_id)
    return {"input_ids": tokens_1S, **arguments}


@pytest.fixture(scope="module")
def references(video_dirs, video_rows, workers):
    """By family: our samples, transformers' model, its arguments for them, and what it makes of them."""
    found = {}
    for family, hf_dir in video_dirs.items():
        model = load_reference(hf_dir)
        items = workers(1).run(cases.encode_rows, hf_dir=hf_dir, rows_file=video_rows)[0]
        inputs = [
            their_inputs(family, hf_dir, model, item, *conversation)
            for item, conversation in zip(items, CONVERSATIONS, strict=True)
        ]
        found[family] = items, model, inputs, reference(model, items, inputs)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_and_positions(family, references):
    items, model, inputs, _ = references[family]
    for item, arguments in zip(items, inputs, strict=True):
        theirs_1S = arguments["input_ids"].clone()
        # our videos stand in the row as images do
        theirs_1S[theirs_1S == model.config.video_token_id] = model.config.image_token_id
        assert item.encoded.tokens_S.tolist() == theirs_1S[0].tolist()
        if family != "llava_onevision":
            names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
            known = {name: arguments[name] for name in names if name in arguments}
            positions, _ = model.model.get_rope_index(**known)
            assert item.encoded.position_ids_3S.tolist() == positions[:, 0].tolist()
    grids = items[0].encoded.grids_thw
    assert len(grids) == 1 and grids[0][0] == {"llava_onevision": 5, "qwen2_5_vl": 2}.get(family, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_equal_transformers(family, layout, video_dirs, references, workers):
    items, _, _, expected = references[family]
    parallel = LAYOUTS[layout]
    size = parallel.get("tensor_model_parallel_size", 1)
    rows = {"videos": (items, expected)}
    ranks = workers(size).run(cases.compare, hf_dir=video_dirs[family], rows=rows, parallel=parallel)
    figures = {figure: max(rank["videos"][figure] for rank in ranks) for figure in ("logits", "loss", "gradients")}
    names = {figure: f"{family} {layout}: {figure}, videos from files" for figure in figures}
    record("parity", [evidence_row(names[figure], figure, value) for figure, value in figures.items()])
    assert all(value <= TOLERANCES[figure] for figure, value in figures.items()), figures


@pytest.mark.parametrize("layout", STEP_LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_equals_transformers(family, layout, video_dirs, video_rows, references, workers):
    ranks = workers(WORLDS.get(layout, 2)).run(
        cases.train_step_against,
        hf_dir=video_dirs[family],
        rows_file=video_rows,
        expected=references[family][3],
        micro_batch_size=1,
        parallel=STEP_LAYOUTS[layout],
    )
    figures = {figure: max(rank[figure] for rank in ranks) for figure in ("loss", "gradients")}
    names = {figure: f"{family} {layout}: {figure}, training step on videos" for figure in figures}
    record("parity", [evidence_row(names[figure], figure, value) for figure, value in figures.items()])
    assert all(value <= TOLERANCES[figure] for figure, value in figures.items()), figures

"""LLaVA-OneVision: SigLIP and Qwen2 on images with tiles; of large ones the joined features are shrunk.

An image that is not alone in its row is padded to a square and has no tiles. Of a video, each frame is a square whose
visual tokens are made a quarter.

Source: Li et al., arXiv 2408.03326; layouts checked against transformers' llava_onevision.
"""

import re
from typing import Any

from megavlm.errors import use_error
from megavlm.models.architecture import Architecture
from megavlm.models.clip import build_tower
from megavlm.models.families import llava, llava_next
from megavlm.models.family import ModelFamily

MODEL_TYPE = "llava_onevision"

_SIDES = range(384, 2304 + 1, 384)
# What transformers assumes when a config.json leaves the keys out.
_SIZES = [(height, width) for height in _SIDES for width in _SIDES]
_ASPECT_RATIO = "anyres_max_9"
_FEATURE_LAYER = -1


def read_config(config: dict[str, Any]) -> Architecture:
    """Read config.json of a `llava_onevision` model."""
    text = config["text_config"]
    defaults = {
        "vision_feature_layer": _FEATURE_LAYER,
        "image_token_index": config.get("image_token_id", 151646),
    }
    tied = config.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    parts = {
        "vision_config": {"model_type": "siglip_vision_model", **config["vision_config"]},
        "text_config": {"model_type": "qwen2", **text},
    }
    plain = llava.read_config({**defaults, **config, **parts, "tie_word_embeddings": tied})
    limit = re.fullmatch(r"anyres_max_(\d+)", config.get("vision_aspect_ratio", _ASPECT_RATIO))
    if limit is None:
        raise use_error(
            "config.json vision_aspect_ratio", config["vision_aspect_ratio"], "anyres_max_N", "only that is supported"
        )
    sizes = config.get("image_grid_pinpoints") or _SIZES
    video_token_id = config.get("video_token_index", config.get("video_token_id", 151647))
    traits = {"max_tile_area": int(limit[1]), "tiles_alone": True}
    videos = {"video_kind": "pooled", "video_token_id": video_token_id}
    return llava_next.with_tiles(plain, MODEL_TYPE, sizes, **traits, **videos)


FAMILY = ModelFamily(
    model_type=MODEL_TYPE,
    read_config=read_config,
    build_tower=build_tower,
    build_projector=llava_next.build_projector,
    weight_map=llava_next.weight_map,
    public_name=llava.public_name,
    memory_name=llava.memory_name,
)

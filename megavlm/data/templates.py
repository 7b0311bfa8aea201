"""Chat templates that a recipe can choose instead of the model directory's own.

The built-in ones follow the formats' public descriptions (ChatML; Vicuna 1.5's and Llama 2's prompts; the first stage
of LLaVA; documents as they are), and each ends an answer with a token, so that a tuned model learns to stop:
LLaVA-1.5's public template prints none.
"""

import json
from importlib import resources
from pathlib import Path

from megavlm.config.tokens import BUILT_IN_TEMPLATES
from megavlm.errors import use_error


def template_text(chosen: str, image_text: str, video_text: str) -> str:
    """A template's Jinja text.

    Args:
        chosen: name of a built-in one, path of a .jinja file, or a Jinja text itself (what a checkpoint keeps).
        image_text: what a built-in one prints for an image.
        video_text: what a built-in one prints for a video.

    Raises:
        UseError: no such template.
    """
    if chosen in BUILT_IN_TEMPLATES:
        file = resources.files("megavlm.data") / "chat_templates" / f"{chosen}.jinja"
        text = file.read_text(encoding="utf-8")
        return text.replace("IMAGE_TEXT", json.dumps(image_text)).replace("VIDEO_TEXT", json.dumps(video_text))
    if "{" in chosen:
        return chosen
    try:
        return Path(chosen).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise use_error(
            "data.template", f"{chosen} ({error})", f"one of {', '.join(BUILT_IN_TEMPLATES)}, or a file", "correct it"
        ) from error

"""What an exported directory says about itself: config.json, chat template, what ends an answer."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megavlm.checkpoint.hf_io import HFDirectory, read_json

EMBEDDING_KEY = "embedding_head"
"""In config.json of an embedding model: what its reader has to know."""
MASK_KEY = "mask_head"
"""In config.json of a model that tells masks: likewise."""


def write_chat_template(out_dir: Path, template: str, eos_token_ids: Sequence[int]) -> None:
    """Give a directory another chat template, so that it is asked as it was trained, and what then ends an answer.

    Args:
        out_dir: with copies of a model's files.
        template: Jinja text.
        eos_token_ids: what ends an answer.
    """
    (out_dir / "chat_template.jinja").write_text(template, encoding="utf-8")
    # Files of older versions of transformers hold templates too; a second one must not contradict.
    for name in ("chat_template.json", "tokenizer_config.json", "processor_config.json"):
        if (out_dir / name).is_file():
            content = read_json(out_dir / name)
            if "chat_template" in content:
                _write_json(out_dir / name, {**content, "chat_template": template})
    path = out_dir / "generation_config.json"
    content = read_json(path) if path.is_file() else {}
    _write_json(path, {**content, "eos_token_id": list(eos_token_ids)})


def write_reward_config(out_dir: Path, stage: str) -> None:
    """Make config.json that of a reward model: classification with one label, of sequences or (stage prm) of tokens.

    transformers has such a class for decoders, not for models with images; vLLM makes one of any model whose
    architecture is called so, and reads `num_labels` of the text part.
    """
    path = out_dir / "config.json"
    content, kind = read_json(path), "ForTokenClassification" if stage == "prm" else "ForSequenceClassification"
    names = [re.sub(r"For\w+$", kind, name) for name in content.get("architectures") or []]
    content |= {"architectures": names, "num_labels": 1}
    if "text_config" in content:
        content["text_config"] = content["text_config"] | {"num_labels": 1}
    _write_json(path, content)


def write_config(directory: HFDirectory, out_dir: Path) -> None:
    """Write a directory's config with its other values, where it has any, and without a head that is not written."""
    content, language = dict(directory.config), directory.architecture.language
    if not language.embedding_dim:
        content.pop(EMBEDDING_KEY, None)
    if language.mask_head is None:
        content.pop(MASK_KEY, None)
    if directory.text_changes or content != directory.config:
        _write_json(out_dir / "config.json", content)


def add_to_config(out_dir: Path, content: Mapping[str, Any]) -> None:
    """Add keys to a directory's config.json."""
    path = out_dir / "config.json"
    _write_json(path, {**read_json(path), **content})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

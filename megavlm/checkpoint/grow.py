"""A Hugging Face directory with further tokens: the same model with a larger vocabulary.

New rows of embedding and output layer begin as the mean of the old ones (Hewitt, "Initializing New Word Embeddings for
Pretrained Language Models", 2021), as in `compose.py`.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megavlm.checkpoint.compose import vocabulary_for, with_new_rows
from megavlm.checkpoint.convert import finished
from megavlm.checkpoint.hf_io import MASK_FILE, HFDirectory, copy_companions, weight_files, write_tensors
from megavlm.checkpoint.safetensors_reader import SafetensorsFile
from megavlm.data.extend_tokens import add_tokens

_OF_VOCABULARY = ("language.embedding.word_embeddings.weight", "language.output_layer.weight")


def write_with_tokens(source_dir: Path, out_dir: Path, tokens: Sequence[str]) -> tuple[int, int]:
    """Write a directory whose tokenizer has further tokens, and whose model knows them.

    Args:
        source_dir: Hugging Face directory with a language model's output layer.
        out_dir: new or empty directory.
        tokens: as texts.

    Returns:
        Tokens that are new, and the vocabulary's size.

    Raises:
        UseError: the source is no such directory or has all tokens, or `out_dir` holds files.
        RunError: writing failed.
    """
    directory = HFDirectory(source_dir)
    directory.check_has_words("tokens")
    directory.check()
    num_bytes = sum(file.stat().st_size for file in weight_files(source_dir))
    with finished(out_dir, num_bytes) as unfinished:
        copy_companions(source_dir, unfinished)
        if (source_dir / MASK_FILE).is_file():
            (unfinished / MASK_FILE).parent.mkdir()
            shutil.copyfile(source_dir / MASK_FILE, unfinished / MASK_FILE)
        before, after = add_tokens(source_dir, unfinished, tokens)
        vocab_size = vocabulary_for(after, directory.architecture.language.vocab_size)
        config = _with_vocabulary(directory.config, vocab_size)
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tensors(_tensors(directory, before, vocab_size), unfinished)
    return after - before, vocab_size


def _with_vocabulary(config: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Where a config speaks of its language model, and where it speaks of itself."""
    config = dict(config)
    if "text_config" in config:
        config["text_config"] = config["text_config"] | {"vocab_size": vocab_size}
    if "vocab_size" in config or "text_config" not in config:
        config["vocab_size"] = vocab_size
    return config


def _tensors(directory: HFDirectory, num_before: int, vocab_size: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under the name that it has in its file."""
    grow = {name for entry in directory.entries if entry.native in _OF_VOCABULARY for name in entry.names}
    # what a tied model carries a second time; heads of other kinds have other rows
    grow |= {name for name in directory.ignored if name.endswith("lm_head.weight")}
    for file in weight_files(directory.path):
        opened = SafetensorsFile(file)
        for name in opened.names:
            tensor = opened.read(name)
            if directory.family.public_name(name) in grow:
                tensor = with_new_rows(tensor, num_before, vocab_size)
            yield name, tensor

"""Prefixes of the language model as peft's PREFIX_TUNING, and back.

peft hands the prefix to the model as a cache of keys that have their place in front of the row already, so that a row's
tokens begin at position P. Here a prefix has no position, and a row begins at 0. Rotary attention sees differences of
positions only: a key that is turned by P positions is to a token at P + t what the same key is, not turned, to a token
at t. With several axes of positions (Qwen-VL) P is added to each, which is the same turn.

Source: the format is checked against peft 0.21 (`PrefixEncoder`, `PeftModel.get_prompt`).

Shape suffixes: L layers, P virtual tokens, G key/value heads, D head dim.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megavlm.checkpoint.adapters import CONFIG, WEIGHTS, AdapterCheckpoint
from megavlm.checkpoint.hf_io import read_json
from megavlm.checkpoint.safetensors_reader import SafetensorsFile
from megavlm.config.tuning import COMPONENTS
from megavlm.errors import use_error
from megavlm.models.architecture import LanguageArchitecture
from megavlm.models.names import Part, global_name, layer_of
from megavlm.models.rope import RotaryAngles
from megavlm.peft.prefix import Prefix

PREFIX_TUNING = "PREFIX_TUNING"
_KEY = "prompt_embeddings"
_NAME = "language.decoder.layers.{layer}.self_attention.core_attention.adapter.{kind}"


def write_prefix(checkpoint: AdapterCheckpoint, out_dir: Path, dtype: torch.dtype | None) -> None:
    """Write a learned prefix as a folder that `peft.PeftModel.from_pretrained` loads.

    Args:
        checkpoint: of a run whose language model has a prefix.
        out_dir: an existing, empty directory.
        dtype: of the written numbers; None: as they are.

    Raises:
        UseError: something else was learned, too, or some layers have no prefix or another length of it.
    """
    language, learned = checkpoint.base.architecture.language, checkpoint.learned
    names = [
        [_NAME.format(layer=layer, kind=kind) for kind in ("key", "value")] for layer in range(language.num_layers)
    ]
    wanted = {name for pair in names for name in pair}
    others = sorted(name for name in learned.specs if name.split(".")[0] in COMPONENTS and name not in wanted)
    lengths = {learned.specs[name].shape[0] if name in learned.specs else 0 for name in wanted}
    if others or len(lengths) > 1:
        raise use_error(
            str(checkpoint.folder),
            f"{others[0]} beside a prefix" if others else "a prefix that not all layers have alike",
            "one prefix for all layers of the language model, and nothing else, as in peft",
            "go on with native checkpoints: training resumes from them in any layout",
        )
    layers = [[learned.read(name) for name in pair] for pair in names]
    both_PL2GD = torch.stack([torch.stack((_turned(key, language, 1), value), 1) for key, value in layers], 1)
    whole = both_PL2GD.flatten(1).to(dtype or layers[0][0].dtype).contiguous()
    save_file({_KEY: whole}, out_dir / WEIGHTS, metadata={"format": "pt"})
    config = _config(checkpoint, *both_PL2GD.shape[:2], *both_PL2GD.shape[3:])
    (out_dir / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config(
    checkpoint: AdapterCheckpoint, num_virtual_tokens: int, num_layers: int, num_heads: int, head_dim: int
) -> dict[str, Any]:
    return {
        "peft_type": PREFIX_TUNING,
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": str(checkpoint.base.path),
        "inference_mode": True,
        "num_virtual_tokens": num_virtual_tokens,
        "num_layers": num_layers,
        "num_attention_heads": num_heads,
        "token_dim": num_heads * head_dim,
        "encoder_hidden_size": num_heads * head_dim,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }


class PrefixFolder:
    """A folder of peft's with a prefix.

    Raises:
        UseError: it is not that of the recipe's model.
    """

    def __init__(self, path: Path, language: LanguageArchitecture) -> None:
        self.path, self._language = path, language
        config = read_json(path / CONFIG)
        file = SafetensorsFile(path / WEIGHTS)
        sizes = (language.num_layers, 2, language.num_query_groups, language.head_dim)
        width = math.prod(sizes)
        if config.get("prefix_projection") or set(file.names) != {_KEY} or file.read(_KEY).shape[1] != width:
            raise use_error(
                str(path),
                "a prefix of another model, or one with an MLP (prefix_projection)",
                f"{_KEY} of {language.num_layers} layers with {language.num_query_groups} heads of {language.head_dim}",
                "give a prefix that was made for this model",
            )
        self._whole_PL2GD = file.read(_KEY).unflatten(1, sizes)

    @torch.no_grad()
    def fill(self, models: Iterable[Part]) -> None:
        """Fill the prefixes of this rank's layers.

        Raises:
            UseError: theirs are of another length.
        """
        for model in models:
            for local_name, module in model.named_modules():
                if not isinstance(module, Prefix):
                    continue
                layer = layer_of(global_name(model, local_name))
                assert layer is not None
                key_PGD, value_PGD = self._whole_PL2GD[:, layer].unbind(1)
                if key_PGD.shape != module.key.shape:
                    raise use_error(
                        str(self.path), f"{len(key_PGD)} virtual tokens", f"{len(module.key)}, as the recipe says",
                        "set peft.num_virtual_tokens to the adapter's",
                    )  # fmt: skip
                module.key.copy_(_turned(key_PGD, self._language, -1))
                module.value.copy_(value_PGD)


def _turned(key_PGD: torch.Tensor, language: LanguageArchitecture, direction: int) -> torch.Tensor:
    """Keys turned by as many positions as there are of them; in fp64, so that turning them back gives the same."""
    angles = RotaryAngles(
        language.head_dim, language.rotary_base, None, False, torch.device("cpu"), language.rope_scaling
    ).inverse_frequencies_F.double()
    angles_D = direction * len(key_PGD) * torch.cat((angles, angles))
    key = key_PGD.cpu().double()
    first, second = key.chunk(2, dim=-1)
    turned = key * angles_D.cos() + torch.cat((-second, first), dim=-1) * angles_D.sin()
    return turned.to(key_PGD.dtype)

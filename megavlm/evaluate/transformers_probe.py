"""transformers' side of a probe. Run it before anything that patches torch is installed.

Shape suffixes: S tokens, V visual tokens, H hidden size.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer

from megavlm.data.sample import Sample
from megavlm.evaluate.probe import Activations
from megavlm.evaluate.transformers_generate import load_checked, model_inputs


@torch.no_grad()
def probe_transformers(hf_dir: str | Path, sample: Sample, max_new_tokens: int) -> Activations:
    """What transformers' model in fp32 makes of a conversation.

    Raises:
        RunError: the directory does not load cleanly.
    """
    model = load_checked(hf_dir)
    tokenizer = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
    processor = AutoImageProcessor.from_pretrained(hf_dir, local_files_only=True)
    inputs = model_inputs([sample], tokenizer, processor, model)
    stages: dict[str, torch.Tensor] = {}
    if "pixel_values" in inputs:
        names = ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images")
        features = model.get_image_features(**{name: inputs[name] for name in names if name in inputs})
        stages["features"] = torch.cat(list(features.pooler_output))
    layers = model.model.language_model.layers

    def keep(number: int) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            stages[f"layer {number}"] = hidden[0]

        return hook

    hooks = [layer.register_forward_pre_hook(keep(n), with_kwargs=True) for n, layer in enumerate(layers)]
    stages["logits"] = model(**inputs).logits[0]
    for hook in hooks:
        hook.remove()
    logits = stages.pop("logits")
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    tokens_S = inputs["input_ids"][0].tolist()
    return Activations(tokens_S, {**stages, "logits": logits}, output[0, len(tokens_S) :].tolist())

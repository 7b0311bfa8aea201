"""The recipe's section on parameter-efficient tuning; `tuning.py` reads it.

Names of knobs are those of ms-swift and of the peft package.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PeftConfig:
    """Parameter-efficient tuning."""

    tuner_type: Literal["full", "lora", "ia3", "adapter", "parallel_adapter", "cross_modal_adapter", "prefix"] = "full"
    """How components learn that `components` does not name and that optimizer.freeze_* leaves free. `full`: all their
    weights. With all others these are frozen, and what is learned stands beside them. `lora`: low-rank matrices beside
    linears. `ia3`: vectors that scale keys, values and the inner activations of MLPs. `adapter`, `parallel_adapter`: a
    narrow MLP behind, or beside, the attention and the MLP of each layer. `cross_modal_adapter`: one behind, which
    words and visual tokens enter and leave by projections of their own, and share in between; of the language model
    alone. `prefix`: keys and values in front of every sample, in each layer."""
    components: str = ""
    """Component by component, and layer range by layer range (from 0, end exclusive), in place of tuner_type and
    freeze_*: `vision: frozen, projector: full, language[0:16]: lora r=8 alpha=16, language[16:32]: frozen`. The last
    entry that names a layer counts. Weights outside of layers (embeddings, last norms) learn only where a component is
    `full` without a range."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Linears that are adapted, by the ends of their Hugging Face names: q_proj, down_proj ...; `all-linear`: those of
    all layers and connectors, experts included, but not the output layer. For lora and ia3."""
    lora_rank: int = 8
    lora_alpha: float = 32.0
    """What is added is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Of the input of the low-rank matrices."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_rank) (rank-stabilised LoRA)."""
    use_dora: bool = False
    """Learn the norm of each row of a weight apart from its direction (DoRA)."""
    lorap_lr_ratio: float = 1.0
    """LoRA+: learning rate of the matrices B over that of A; 1: the same."""
    bnb_4bit_quant_type: Literal["none", "nf4", "fp4"] = "none"
    """QLoRA: frozen matrices are kept in 4 bits, by bitsandbytes; `none`: in the precision of training."""
    bnb_4bit_use_double_quant: bool = True
    """Their scales are quantised, too."""
    quantized_components: tuple[str, ...] = ("language",)
    """Whose linears are kept in 4 bits, where they are frozen; embeddings and the output layer never are."""
    adapter_size: int = 64
    """Inner width of `adapter`, `parallel_adapter` and `cross_modal_adapter`."""
    num_virtual_tokens: int = 16
    """Keys and values of `prefix`."""
    adapters: str = ""
    """Folder in peft's format (adapter_config.json, adapter_model.safetensors) whose weights training starts from."""

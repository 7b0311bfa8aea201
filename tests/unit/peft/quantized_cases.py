"""What the workers run: weights in 4 bits, against bitsandbytes' own functions on the whole tensors."""

from pathlib import Path
from typing import Any

import torch


def compare_with_bitsandbytes(hf_dir: Path, peft: dict[str, Any], parallel: dict[str, Any]) -> dict[str, Any]:
    """Which linears of this rank differ from its part of what bitsandbytes makes of the whole, and bytes of both."""
    import bitsandbytes.functional as bnb

    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.config.peft import PeftConfig
    from megavlm.models.names import stacked_name
    from megavlm.parallel.groups import initialize
    from megavlm.peft.targets import held_rows, linears_of
    from megavlm.platform.seeds import seed_everything
    from megavlm.train.parts import build_parts
    from tests.parity.cases import recipe_of

    recipe = recipe_of(hf_dir, parallel, peft=PeftConfig(**peft))
    directory = HFDirectory(hf_dir)
    groups = initialize(recipe.parallel)
    seed_everything(0)
    parts = build_parts(recipe, directory, groups, 0)
    by_native = {entry.native: entry for entry in directory.entries}

    def there_and_back(tensor: torch.Tensor) -> torch.Tensor:
        packed, state = bnb.quantize_4bit(
            tensor.contiguous(),
            blocksize=64,
            compress_statistics=recipe.peft.bnb_4bit_use_double_quant,
            quant_type=recipe.peft.bnb_4bit_quant_type,
        )
        return bnb.dequantize_4bit(packed, state)

    different, names, num_bytes, full_bytes = [], [], 0, 0
    for part in parts.all:
        for name, linear in linears_of(part):
            if linear.store is None:
                continue
            native, expert = stacked_name(f"{name}.weight")
            entry = by_native[native]
            whole = [there_and_back(tensor) for tensor in directory.read_parts(entry, expert)]
            expected = entry.to_native(whole) if expert is None else whole[0]
            size, rank = linear.tp_group.size(), linear.tp_group.rank()
            if "Column" in type(linear).__name__:
                expected = expected[held_rows(len(expected), size, rank, entry.halves)]
            else:
                expected = expected.chunk(size, dim=1)[rank]
            if not torch.equal(linear.store.matrix(), expected):
                different.append(name)
            names.append(name)
            num_bytes += linear.store.num_bytes
            full_bytes += expected.nbytes
    return {"different": different, "names": names, "bytes": num_bytes, "full bytes": full_bytes}

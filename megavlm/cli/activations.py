"""`megavlm convert diff --activations`: at which layer two models' numbers part, on an image and a question."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megavlm.data.sample import Sample
    from megavlm.evaluate.probe import Activations


def diff_activations(paths: list[str], hf_dir: str | None) -> tuple[list[str], bool]:
    """Lines on how two models' activations differ, and whether they do.

    Args:
        paths: two Hugging Face directories or native checkpoints.
        hf_dir: describes native checkpoints; not needed where one of the paths is a directory of their model.

    Raises:
        UseError: nothing describes a native checkpoint, or the models are not of one kind.
    """
    from megavlm.errors import use_error
    from megavlm.evaluate.probe import NUM_NEW_TOKENS, PROMPT, compare, probe_sample, write_probe_image

    described = [path for path in (*paths, *([hf_dir] if hf_dir else [])) if (Path(path) / "config.json").is_file()]
    if not described:
        raise use_error("--hf-dir", "nothing", "the directory that describes the checkpoints", "add --hf-dir DIR")
    with tempfile.TemporaryDirectory(prefix="megavlm-probe-") as folder:
        image = Path(folder) / "probe.png"
        write_probe_image(image)
        sample = probe_sample(PROMPT, (str(image),))
        first, second = (_probe(path, described[0], sample, NUM_NEW_TOKENS) for path in paths)
    if first.tokens_S != second.tokens_S or list(first.stages) != list(second.stages):
        raise use_error(
            "convert diff", "models that read the prompt differently", "two of one kind", "compare their tensors"
        )
    found = compare(first, second)
    lines = [f"  {one.name}: largest difference {one.largest:.3g}, relative {one.relative:.3g}" for one in found]
    differing = [one.name for one in found if not one.largest == 0]
    said = f"they part at {differing[0]}" if differing else "equal at every layer"
    answers = "the same" if first.answer == second.answer else "another"
    return [f"activations: {said}; {answers} greedy answer", *lines], bool(differing)


def _probe(path: str, description: str, sample: "Sample", num_tokens: int) -> "Activations":
    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.checkpoint.native import find_checkpoint
    from megavlm.train.probe import probe_native

    if (Path(path) / "config.json").is_file():
        return probe_native(HFDirectory(path), None, sample, num_tokens)
    return probe_native(HFDirectory(description), find_checkpoint(Path(path), required=True), sample, num_tokens)

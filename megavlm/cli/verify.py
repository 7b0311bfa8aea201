"""`megavlm convert verify`: a certificate of a directory's weights, and of what its model computes."""

import argparse
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megavlm.evaluate.probe import Activations


def verify(args: argparse.Namespace) -> int:
    """Write conversion.json, and say what is in it; 1 when something differs."""
    from megavlm.errors import use_error

    if not args.hf_dir or args.out or args.dtype:
        raise use_error("convert verify", "other options", "--hf-dir, and perhaps --checkpoint", "name the directory")
    with tempfile.TemporaryDirectory(prefix="megavlm-probe-") as folder:
        return _verify(args, Path(folder))


def _verify(args: argparse.Namespace, scratch: Path) -> int:
    from safetensors import SafetensorError

    from megavlm.errors import use_error
    from megavlm.evaluate.probe import NUM_NEW_TOKENS, PROMPT, probe_sample, write_probe_image

    image = scratch / "probe.png"
    write_probe_image(image)
    sample = probe_sample(PROMPT, (str(image),))
    theirs = None
    model_type = _model_type(args.hf_dir)
    if not model_type:
        raise use_error("--hf-dir", f"`{args.hf_dir}`", "a directory with a model's config.json", "check the path")
    if model_type != "megavlm":  # composed models are nobody else's
        from megavlm.evaluate.transformers_probe import probe_transformers

        # Before the platform's adapter, so that transformers runs as it does for everybody.
        try:
            theirs = probe_transformers(args.hf_dir, sample, NUM_NEW_TOKENS)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise use_error(
                args.hf_dir, f"`{said}` from transformers", "a complete model", "restore the files"
            ) from error
    from megavlm.platform.start import start

    start()
    from megavlm.checkpoint.certificate import against_checkpoint, tensor_table, write_certificate
    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.checkpoint.manifest import damaged_files
    from megavlm.checkpoint.native import find_checkpoint
    from megavlm.train.probe import probe_native

    directory = HFDirectory(args.hf_dir)
    directory.check_has_words("a comparison of answers")
    certificate: dict[str, Any] = {
        "model_type": directory.family.model_type,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "transformers")},
        "tensors": tensor_table(directory),
    }
    lines, problems = [f"{len(certificate['tensors'])} tensors, every one mapped and hashed"], []
    if args.checkpoint:
        folder = find_checkpoint(Path(args.checkpoint), required=True)
        assert folder is not None
        damaged = damaged_files(folder)
        certificate["checkpoint"] = {"step": folder.name, "damaged": damaged}
        if damaged:  # its tensors may not even be readable
            problems.append(f"damaged files in {folder.name}, not compared: {', '.join(damaged[:3])}")
        else:
            differing = against_checkpoint(directory, folder)
            certificate["checkpoint"]["differing"] = differing
            lines.append(f"{folder}: undamaged; {len(differing) or 'no'} tensor(s) differ from what was exported")
            problems += [f"tensors differ from {folder.name}: {', '.join(differing[:3])}"] if differing else []
    ours = probe_native(directory, None, sample, NUM_NEW_TOKENS)
    if theirs is None:
        certificate["probe"] = {"reference": "none: transformers has no such model", "ours": ours.answer}
        lines.append("no other program knows this kind of model: nothing to compare its numbers with")
    else:
        certificate["probe"] = _probe(ours, theirs, lines, problems)
    certificate["problems"] = problems
    path = write_certificate(directory.path, certificate)
    sys.stdout.write("\n".join([*lines, *problems, f"certificate: {path}"]) + "\n")
    return 1 if problems else 0


def _model_type(hf_dir: str) -> str:
    path = Path(hf_dir) / "config.json"
    if not path.is_file():
        return ""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return ""
    return str(config.get("model_type", "")) if isinstance(config, dict) else ""


def _probe(ours: "Activations", theirs: "Activations", lines: list[str], problems: list[str]) -> dict[str, Any]:
    """What the certificate says of the probe; adds to the lines and problems."""
    from megavlm.evaluate.probe import LIMIT, compare, first_apart

    found: dict[str, Any] = {"reference": "transformers", "limit": LIMIT, "num_tokens": len(ours.tokens_S)}
    if ours.tokens_S != theirs.tokens_S:
        problems.append(f"the prompt: {len(ours.tokens_S)} tokens here, {len(theirs.tokens_S)} in transformers")
        return found
    differences = compare(ours, theirs)
    apart = first_apart(differences)
    worst = max(differences, key=lambda one: one.relative)
    found["stages"] = [vars(one) for one in differences]
    found["first_apart"] = apart
    found["greedy_tokens"] = {"ours": ours.answer, "transformers": theirs.answer}
    lines.append(
        f"against transformers in fp32: {len(differences)} stages, worst relative difference {worst.relative:.2g} "
        f"({worst.name}); greedy tokens {'equal' if ours.answer == theirs.answer else 'differ'}"
    )
    if apart:
        problems.append(f"the models part at {apart}: relative difference over {LIMIT:g}")
    if ours.answer != theirs.answer:
        problems.append("greedy tokens differ")
    return found

"""`megavlm convert`: Hugging Face directory to native checkpoint and back."""

import argparse
import logging
import sys
from pathlib import Path

SUMMARY = "convert between Hugging Face directories and native checkpoints, or look into one"

EPILOG = """\
examples:
  megavlm convert export --checkpoint runs/demo/checkpoints --hf-dir models/qwen3-vl --out exported
  megavlm convert export --checkpoint runs/lora/checkpoints --hf-dir models/qwen3-vl --adapter-only --out adapter
  megavlm convert import --hf-dir models/qwen3-vl --out native
  megavlm convert verify --hf-dir exported --checkpoint runs/demo/checkpoints
  megavlm convert inspect --checkpoint runs/demo/checkpoints
  megavlm convert inspect --hf-dir models/qwen3-vl
  megavlm convert diff models/qwen3-vl runs/demo/checkpoints

verify writes conversion.json beside the weights: a hash of every tensor, whether they are the checkpoint's (and the
checkpoint's files those that were written), and for an image and a question the difference of every layer, and of the
greedy tokens, from transformers. diff says at which tensor two models part, in running order, and with --activations
at which layer. The exit code of both is 1 where something differs.

export takes the newest complete checkpoint of a folder, or the step folder that is named. Config, tokenizer, template
and processor files are copied from --hf-dir, the directory that training started from. Adapters are merged into the
weights; with --adapter-only they are written in the format of the peft package, which loads them beside the weights of
--hf-dir (and a recipe does, by peft.adapters). Training itself starts from a
Hugging Face directory, so import is only needed for a native copy. With --dtype fp8 it is for
inference alone: matrices of the decoder in E4M3 with scales of 128 x 128 numbers, as transformers and vLLM read them.
Both go tensor by tensor: a model needs little more
memory than its largest tensor, no GPU and no process group, and a native checkpoint loads in any layout.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EPILOG
    parser.add_argument("direction", choices=["import", "export", "verify", "inspect", "diff"])
    parser.add_argument("paths", metavar="DIR", nargs="*", help="of diff: two directories or native checkpoints")
    parser.add_argument("--hf-dir", help="Hugging Face directory: source, and description of the model")
    parser.add_argument("--checkpoint", help="native checkpoint to export: a step folder, or a folder of them")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="of import and export: read weights that torch.save wrote, too"
    )
    parser.add_argument(
        "--adapter-only", action="store_true", help="of export: write adapters in peft's format, not merged weights"
    )
    parser.add_argument("--activations", action="store_true", help="of diff: also compare what goes into every layer")
    parser.add_argument("--out", help="new or empty directory")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "fp8"],
        help="of the exported weights (default: as in --hf-dir); fp8: E4M3 with 128 x 128 block scales, rest bfloat16",
    )


def run(args: argparse.Namespace) -> int:
    """Convert."""
    from megavlm.platform.huge_pages import prefer_huge_pages

    prefer_huge_pages()
    from megavlm.errors import use_error
    from megavlm.platform.start import start

    if args.direction == "diff":
        return _diff(args)
    if args.direction == "verify" and not args.paths:
        from megavlm.cli.verify import verify

        return verify(args)
    if args.paths:
        raise use_error(f"convert {args.direction}", args.paths[0], "options alone", "put --hf-dir before it")
    if args.direction == "inspect":
        return _inspect(args)
    for name, value in (("--hf-dir", args.hf_dir), ("--out", args.out)):
        if not value:
            raise use_error(name, "nothing", "a directory", f"add {name} DIR")
    if args.direction == "export" and not args.checkpoint:
        raise use_error("--checkpoint", "nothing", "a native checkpoint", "name the folder to export")
    if args.direction == "import" and (args.checkpoint or args.dtype or args.adapter_only):
        raise use_error("convert import", "--checkpoint, --dtype or --adapter-only", "none", "they belong to export")
    if args.adapter_only and args.dtype == "fp8":
        raise use_error("--dtype", "fp8 with --adapter-only", "float32, bfloat16 or float16", "e.g. --dtype bfloat16")
    start()
    from megavlm.checkpoint.convert import export_adapter, export_checkpoint, import_checkpoint
    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.checkpoint.native import find_checkpoint

    logger = logging.getLogger("megavlm")
    directory, out = HFDirectory(args.hf_dir, args.allow_pickle), Path(args.out)
    folder = find_checkpoint(Path(args.checkpoint), required=True) if args.checkpoint else None
    if folder is not None:
        export = export_adapter if args.adapter_only else export_checkpoint
        step = export(folder, directory, out, args.dtype)
        logger.info("exported step %d of %s to %s", step, folder, out)
    else:
        logger.info("imported %s to %s", directory.path, import_checkpoint(directory, out))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    """Print what a directory holds."""
    from megavlm.errors import use_error
    from megavlm.platform.start import start

    if bool(args.hf_dir) == bool(args.checkpoint) or args.out or args.dtype:
        raise use_error(
            "convert inspect", "other options", "either --hf-dir or --checkpoint, nothing else", "name one directory"
        )
    start()
    from megavlm.checkpoint.inspect import inspect_hf, inspect_native

    lines = inspect_hf(Path(args.hf_dir)) if args.hf_dir else inspect_native(Path(args.checkpoint))
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _diff(args: argparse.Namespace) -> int:
    """Print where two models part; 1 if they do."""
    from megavlm.errors import use_error
    from megavlm.platform.start import start

    if len(args.paths) != 2 or args.checkpoint or args.out or args.dtype or (args.hf_dir and not args.activations):
        raise use_error("convert diff", f"{len(args.paths)} directories", "two, and no options", "name two directories")
    start()
    from megavlm.checkpoint.diff import report, source_of

    lines, differ = report(*(source_of(Path(path)) for path in args.paths))
    if args.activations:
        from megavlm.cli.activations import diff_activations

        more, also = diff_activations(args.paths, args.hf_dir)
        lines, differ = lines + more, differ or also
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if differ else 0

"""`megavlm generate`: ask a model about images and videos."""

import argparse
import sys
from pathlib import Path

SUMMARY = "ask a model a question, with or without images and videos"

EPILOG = """\
examples:
  megavlm generate --hf-dir exported --image cat.png --prompt "What is this?"
  megavlm generate --hf-dir models/qwen3-vl --checkpoint runs/sft/checkpoints --image a.png --image b.png \\
      --prompt "<image><image>Which one is larger?"

Greedy, on this project's own model, one pass over everything for each token: to look at a model, not to serve it.
Images and videos go where <image> and <video> stand in the prompt, in front of it when it names none.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EPILOG
    parser.add_argument("--hf-dir", required=True, help="Hugging Face directory of the model")
    parser.add_argument("--checkpoint", help="native checkpoint whose weights to use instead of the directory's")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--image", action="append", default=[], help="an image file; may be given several times")
    parser.add_argument("--video", action="append", default=[], help="a video file; may be given several times")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")


def run(args: argparse.Namespace) -> int:
    """Answer on standard output."""
    from megavlm.errors import use_error
    from megavlm.platform.start import start

    if args.max_new_tokens < 1:
        raise use_error("--max-new-tokens", args.max_new_tokens, "at least 1", "drop it for 64")
    for option, files in (("--image", args.image), ("--video", args.video)):
        for file in files:
            if not Path(file).is_file():
                raise use_error(option, file, f"an existing {option.removeprefix('--')} file", "check the path")
    start()
    from megavlm.train.ask import ask

    answer = ask(
        args.hf_dir,
        args.checkpoint,
        args.prompt,
        tuple(str(Path(image).resolve()) for image in args.image),
        tuple(str(Path(video).resolve()) for video in args.video),
        args.system,
        args.max_new_tokens,
        args.precision,
    )
    sys.stdout.write(answer + "\n")
    return 0

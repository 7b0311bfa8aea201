"""`megavlm compose`: a vision tower and a language model become a vision-language model to train."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

SUMMARY = "put a vision tower and a text-only language model together, with a new connector"

EPILOG = """\
The tower is a CLIP or SigLIP model's directory; the language model a Llama, Mistral, Qwen2, Qwen2.5 or Qwen3 directory
with a tokenizer and a chat template. Connectors and their keys (key=value):
  mlp                two layers; the result is a LLaVA directory, which transformers and vLLM read
  pixel_shuffle_mlp  scale_factor^2 neighbouring patches become one (scale_factor=2)
  perceiver          learned queries read the image (num_queries=64 num_hidden_layers=3 num_attention_heads=16 ...)
  gated_cross_attention  Flamingo's: a perceiver, read by new layers in front of every fourth of the language model's
                     (the perceiver's keys, cross_layer_interval=4); their gates begin closed
  qformer            BLIP-2's (num_queries=32 num_hidden_layers=12 hidden_size=768 cross_attention_frequency=2 ...)

examples:
  megavlm compose --vision clip-vit-large-patch14-336 --language SmolLM2-135M-Instruct --out my-llava
  megavlm compose --vision clip --language Qwen3-0.6B --connector perceiver num_queries=32 --out my-vlm
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EPILOG
    parser.add_argument("keys", metavar="key=value", nargs="*", help="keys of the connector")
    parser.add_argument("--vision", required=True, metavar="DIR", help="Hugging Face directory of the vision tower")
    parser.add_argument("--language", required=True, metavar="DIR", help="Hugging Face directory of the language model")
    parser.add_argument("--out", required=True, metavar="DIR", help="new or empty directory")
    parser.add_argument(
        "--connector",
        default="mlp",
        help="mlp, pixel_shuffle_mlp, perceiver, qformer, gated_cross_attention (default: mlp)",
    )
    parser.add_argument("--image-token", default="<image>", help="placeholder of an image (default: <image>)")
    parser.add_argument("--feature-layer", type=int, help="hidden state that is the feature (default: -2)")
    parser.add_argument("--seed", type=int, default=0, help="of the connector's first weights (default: 0)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the language model's")


def run(args: argparse.Namespace) -> int:
    """Compose."""
    import logging

    from megavlm.platform.start import start

    connector: dict[str, Any] = {"type": args.connector, **_read_keys(args.keys)}
    start()
    from megavlm.checkpoint.compose import Composition, composed_config, write_composed
    from megavlm.checkpoint.hf_io import make_empty
    from megavlm.data.extend_tokens import extend_tokens

    out = Path(args.out)
    parts = Composition(
        Path(args.vision), Path(args.language), connector, args.image_token, args.feature_layer, args.seed, args.dtype
    )
    composed_config(parts, 0, 0)  # what cannot be is said before anything is written
    make_empty(out)
    # A failure leaves nothing behind that looks like a model.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.absolute().parent) as folder:
        unfinished = Path(folder) / out.name
        unfinished.mkdir()
        tokens = extend_tokens(parts.language_dir, unfinished, args.image_token)
        config = composed_config(parts, tokens.image_token_id, tokens.num_tokens)
        write_composed(parts, config, tokens.num_tokens_before, unfinished)
        unfinished.rename(out)  # over the empty directory
    logging.getLogger("megavlm").info("composed %s: a %s model", out, config["model_type"])
    return 0


def _read_keys(words: list[str]) -> dict[str, int | float]:
    from megavlm.errors import use_error

    keys: dict[str, int | float] = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            keys[name] = int(text) if text.lstrip("-").isdigit() else float(text)
        except ValueError as error:
            raise use_error("connector key", word, "key=number", "write e.g. num_queries=32") from error
    return keys

"""Hugging Face directory to native checkpoint: `megavlm convert import` under the name that people look for.

python tools/hf_to_megatron.py --hf-dir models/qwen3-vl --out native
"""

import sys

from megavlm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "import", *sys.argv[1:]]))

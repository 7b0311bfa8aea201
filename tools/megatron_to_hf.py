"""Native checkpoint to Hugging Face directory: `megavlm convert export` under the name that people look for.

python tools/megatron_to_hf.py --checkpoint runs/demo/checkpoints --hf-dir models/qwen3-vl --out exported
"""

import sys

from megavlm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "export", *sys.argv[1:]]))

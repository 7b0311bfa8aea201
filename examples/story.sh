#!/usr/bin/env bash
# The story of a vision-language model, on real images and two CPU processes: from random weights to preferences. Every
# chapter starts from the export of the one before, and is a recipe and commands that can be run by hand as well.
# Writes runs/story/report.html, one page about all of it, and runs/story/summary.json; ends with 1 when a held-out
# figure did not rise. `make story` sets up .venv first.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
SECONDS=0

export PATH="$PWD/.venv/bin:$PATH"
# What all commands have taken so far; the summary has the difference from chapter to chapter.
end_of() { times > "runs/story/$1/times.txt"; }

# Handwritten digits composed into numbers, rows about them, and a tiny Qwen3-VL that knows nothing.
python examples/story.py prepare

# 1. Images and captions learn to find each other. The vision tower is what stays of it. DP2
megavlm train examples/recipes/story_1_contrastive.yaml --nproc 2
megavlm convert export --checkpoint runs/story/1_contrastive/checkpoints --hf-dir runs/story-input/model --out runs/story/1_contrastive/hf
end_of 1_contrastive

# 2. The language model reads text. With one that somebody has pretrained, this is left out. TP2 with sequence parallelism
megavlm train examples/recipes/story_2_words.yaml --nproc 2
megavlm convert export --checkpoint runs/story/2_words/checkpoints --hf-dir runs/story/1_contrastive/hf --out runs/story/2_words/hf
python examples/story.py ask 2_words
end_of 2_words

# 3. The projector learns captions, between a tower and a language model that stay as they are. The encoder's own stage
megavlm train examples/recipes/story_3_align.yaml --nproc 2
megavlm convert export --checkpoint runs/story/3_align/checkpoints --hf-dir runs/story/2_words/hf --out runs/story/3_align/hf
python examples/story.py ask 3_align
end_of 3_align

# 4. Questions and answers: LoRA on the language model, the projector whole. PP2
megavlm train examples/recipes/story_4_sft.yaml --nproc 2
megavlm convert export --checkpoint runs/story/4_sft/checkpoints --hf-dir runs/story/3_align/hf --out runs/story/4_sft/hf
python examples/story.py ask 4_sft
end_of 4_sft

# 5. Better and worse answers: DPO, by LoRA; the reference is the model without its adapters. CP2
megavlm train examples/recipes/story_5_dpo.yaml --nproc 2
megavlm convert export --checkpoint runs/story/5_dpo/checkpoints --hf-dir runs/story/4_sft/hf --out runs/story/5_dpo/hf
python examples/story.py ask 5_dpo
end_of 5_dpo

megavlm report runs/story/1_contrastive runs/story/2_words runs/story/3_align runs/story/4_sft runs/story/5_dpo \
    --title "From random weights to preferences" --out runs/story/report.html
python examples/story.py check --wall-s "$SECONDS"

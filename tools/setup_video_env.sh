#!/usr/bin/env bash
# Makes .venv-video in the repository: transformers with torchvision, for `make test-video`. torchvision is not in .venv
# because transformers would then take its processors for images, too; its Python part is enough, so that the
# registry's build (for CUDA) serves beside the CPU's torch.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv-video
requirements=$root/requirements/video.txt
stamp=$venv/.setup-done
python=${PYTHON311:-python3.11}

if [ -f "$stamp" ] && [ "$(sha256sum <"$requirements")" = "$(cat "$stamp")" ]; then exit 0; fi
printf 'setup: making .venv-video\n' >&2
rm -rf "$venv"
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input --quiet --quiet)
"${pip[@]}" install --requirement "$requirements"
"${pip[@]}" install --no-deps torchvision==0.28.0
sha256sum <"$requirements" >"$stamp"

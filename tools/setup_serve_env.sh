#!/usr/bin/env bash
# Makes .venv-serve in the repository: vLLM's CPU build, for `make test-serve` (some GB, some minutes the first time).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv-serve
requirements=$root/requirements/serve.txt
stamp=$venv/.setup-done

if [ -f "$stamp" ] && [ "$(sha256sum <"$requirements")" = "$(cat "$stamp")" ]; then exit 0; fi
printf 'setup: making .venv-serve\n' >&2
rm -rf "$venv"
python3.11 -m venv "$venv"
"$venv/bin/python" -m pip --disable-pip-version-check --no-input --quiet --quiet install --requirement "$requirements"
# Broken beside a CPU build of torch, and not needed.
"$venv/bin/python" -m pip --disable-pip-version-check --quiet --quiet uninstall --yes torchaudio torchcodec
sha256sum <"$requirements" >"$stamp"

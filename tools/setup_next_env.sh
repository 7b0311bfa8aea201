#!/usr/bin/env bash
# Makes .venv-next in the repository: the newest megatron-core on Python 3.12, for `make test-next` (some GB: the package
# registry's torch for 3.12 is a CUDA build). Python 3.12 is found in PATH, or named in PYTHON312.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv-next
requirements=$root/requirements/next.txt
stamp=$venv/.setup-done
python=${PYTHON312:-python3.12}

if [ -f "$stamp" ] && [ "$(sha256sum <"$requirements")" = "$(cat "$stamp")" ]; then exit 0; fi
if ! "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; then
    printf 'setup: got no usable %s; expected Python 3.12; fix: install it, or set PYTHON312 to its path\n' "$python" >&2
    exit 1
fi
printf 'setup: making .venv-next\n' >&2
rm -rf "$venv"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip --disable-pip-version-check --no-input --quiet --quiet install --requirement "$requirements"
sha256sum <"$requirements" >"$stamp"

#!/usr/bin/env bash
# Makes .venv in the repository: the pinned CPU stack of requirements/, and megavlm itself (editable).
# A second run reuses it. An interrupted run is started over; two runs at once wait for each other.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
venv=$root/.venv
stamp=$venv/.setup-done       # what this .venv was made from, written last
unfinished=$venv/.setup-unfinished

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

fingerprint() {
    printf '%s\n' "$root"     # the scripts in .venv/bin hold this path
    cat requirements/*.txt setup.py tools/setup_env.sh | sha256sum
}

is_ready() {
    [ -f "$stamp" ] && [ ! -e "$unfinished" ] && [ -x "$venv/bin/python" ] && [ "$(fingerprint)" = "$(cat "$stamp")" ]
}

# The first Python of 3.11, 3.12, 3.10 that starts and can make environments. Its name goes to stdout.
find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.10 python3 python; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
            >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no usable Python found; expected python3.11 (or 3.12, 3.10) with its venv module;" \
        "fix: install it, e.g. apt-get install python3.11 python3.11-venv"
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# The interpreter of .venv if it can be kept: finished, of the wanted version, made for this folder. Otherwise nothing
# is left of it but the lock.
clear_unless_usable() {
    if [ ! -e "$unfinished" ] && [ -x "$venv/bin/python" ] \
        && [ "$(version_of "$venv/bin/python" 2>/dev/null)" = "$1" ] \
        && grep -qsF "$venv" "$venv/bin/activate"; then
        return
    fi
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .setup-lock -exec rm -rf {} +
}

install_packages() {
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input --quiet --quiet)
    # pip itself stays what Python brought: it is no part of the stack.
    if [ "$1" = 3.11 ]; then
        "${pip[@]}" install torch==2.13.0 --constraint requirements/dev.txt
        "${pip[@]}" install --requirement requirements/dev.txt
        "${pip[@]}" install --no-deps --no-build-isolation --editable .
    else
        say "the pins of requirements/ are for Python 3.11; on $1 other packages come within the bounds of setup.py"
        "${pip[@]}" install 'setuptools>=77.0.3' torch==2.13.0
        "${pip[@]}" install --no-build-isolation --editable '.[cpu,dev]'
    fi
}

main() {
    if is_ready; then return; fi
    command -v flock >/dev/null || fail "flock not found; fix: install util-linux"
    mkdir -p "$venv"
    exec 9>"$venv/.setup-lock"
    if ! flock --nonblock 9; then
        say "another run is making .venv, waiting for it"
        flock 9
        if is_ready; then return; fi
    fi
    local python version
    python=$(find_python)
    version=$(version_of "$python")
    clear_unless_usable "$version"
    say "making .venv with Python $version (some minutes the first time)"
    touch "$unfinished"
    rm -f "$stamp"
    # A virtual environment that is active here must not leak into the new one.
    unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    install_packages "$version"  # pip inherits the lock: it holds while an orphaned pip still writes
    rm -f "$unfinished"
    fingerprint >"$stamp.new"
    mv "$stamp.new" "$stamp"
    say "done in ${SECONDS} s"
}

main

#!/usr/bin/env bash
# Sets up the CPU stack in its own virtual environment. Idempotent: a second run skips what is there.
#   VENV    where the environment lies (default: .venv beside this repository's README)
#   PYTHON  interpreter to make it with (default: python3)
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
PYTHON=${PYTHON:-python3}
TORCH=2.13.0
STAMP=$VENV/.verl_prefix_setup
WANT=$(cat "$ROOT/setup.py" "$ROOT"/recipes/{lock,constraints}_cpu.txt "${BASH_SOURCE[0]}" | sha256sum | cut -d' ' -f1)

if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$WANT $ROOT" ]; then
    echo "[setup] $VENV is up to date"
    exit 0
fi

say() { echo "[setup] $(date +%H:%M:%S) $*"; }
"$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || {
    echo "[setup] $($PYTHON --version) is not supported; name a Python 3.10 to 3.12 with PYTHON=..." >&2
    exit 1
}
[ -x "$VENV/bin/python" ] || { say "virtual environment in $VENV"; "$PYTHON" -m venv "$VENV"; }
LOG=$VENV/setup.log
# pip's own output goes to a log; a line is shown now and then, since the longest step takes minutes
install() {
    "$VENV/bin/python" -m pip --disable-pip-version-check install "$@" >"$LOG" 2>&1 &
    local pid=$! begin=$SECONDS
    while kill -0 $pid 2>/dev/null; do
        sleep 1
        [ $(((SECONDS - begin) % 15)) -eq 0 ] && [ $SECONDS -gt $begin ] &&
            say "  $((SECONDS - begin)) s: $(grep -oE '^(Collecting|Downloading|Building|Installing) [^ ]*' "$LOG" | tail -n 1)"
    done
    wait $pid || { tail -n 20 "$LOG" >&2; echo "[setup] pip failed; its whole output is in $LOG" >&2; exit 1; }
}

installed_torch() { "$VENV/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true; }
if [ "$(installed_torch)" != "$TORCH+cpu" ]; then
    say "torch $TORCH, CPU build"
    if ! { command -v uv >/dev/null &&
        uv pip install --quiet --python "$VENV/bin/python" --torch-backend=cpu "torch==$TORCH"; }; then
        # --no-deps: should the index serve a CUDA build, do not fetch gigabytes of CUDA libraries with it
        install --no-deps "torch==$TORCH"
    fi
    if [ "$(uname -s)" = Linux ] && [ "$(installed_torch)" != "$TORCH+cpu" ]; then
        echo "[setup] the package index gave torch $(installed_torch), not the CPU build. Install uv (pip install uv) and" \
            "run this again: it takes the CPU build with --torch-backend=cpu." >&2
        exit 1
    fi
fi

# The lock fits the Python and platform in its first line; elsewhere some of its versions have no build.
HERE=$("$VENV/bin/python" -c 'import platform as p; print("Python {}.{} on".format(*p.python_version_tuple()), p.system(), p.machine())')
CONSTRAINTS=$ROOT/recipes/lock_cpu.txt
if ! head -n 1 "$CONSTRAINTS" | grep -qF "for $HERE."; then
    CONSTRAINTS=$ROOT/recipes/constraints_cpu.txt
    say "the lock is not for $HERE; versions are held by ${CONSTRAINTS##*/} alone"
fi
say "verl, vLLM for CPU, this package (about 2 minutes), versions of ${CONSTRAINTS##*/}"
install --constraint "$CONSTRAINTS" "torch==$(installed_torch)" --editable "$ROOT[cpu,dev]"

# vLLM asks for these; where the index has only builds for CUDA they break transformers, and a text model needs none.
for package in torchvision torchaudio torchcodec; do
    if ! "$VENV/bin/python" -c "import $package" >/dev/null 2>&1; then
        "$VENV/bin/python" -m pip --quiet uninstall --yes "$package" >/dev/null 2>&1 || true
    fi
done

say "check"
"$VENV/bin/python" - <<'PY'
import transformers.models.qwen2.modeling_qwen2  # noqa: F401  breaks if a companion of torch does not fit

import verl  # noqa: F401
from verl.plugin.platform import get_platform

print(f"[setup] verl loads the plugin; platform: {get_platform().device_name}")
PY
echo "$WANT $ROOT" >"$STAMP"
say "done"

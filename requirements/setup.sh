#!/usr/bin/env bash
# Make a virtual environment from the hashed lock and install this package into it, editable.
#   requirements/setup.sh PYTHON VENV
#   requirements/setup.sh PYTHON VENV LOCK    another lock's packages, without this one
# torch's CPU wheel is tried from the configured index and wheel folders first; elsewhere it comes from PyTorch's own
# CPU index. The lock's hash holds for either.
set -euo pipefail
python=$1 venv=$2 lock=${3:-requirements/cpu.lock}
torch_index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

command -v "$python" >/dev/null || python=python3
"$python" - <<'PY' || { echo "setup: expected Python 3.11 (the lock is for it), found $("$python" -V 2>&1). Set PYTHON=..." >&2; exit 2; }
import sys
sys.exit(sys.version_info[:2] != (3, 11))
PY
# Without Debian's python3-venv a first try leaves half an environment: make it anew when pip is not in it.
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"

pip=("$venv/bin/python" -m pip --disable-pip-version-check)
quiet=(--quiet --quiet --no-deps --require-hashes)
torch=$(mktemp) first_try=$(mktemp)
trap 'rm -f "$torch" "$first_try"' EXIT
# The requirement's own lines: its name and its hashes, to the first line that does not go on.
awk '/^torch==/ {on=1} on {print} on && !/\\$/ {exit}' "$lock" >"$torch"

echo "setup: $(grep -cE '^[a-z0-9].*==' "$lock") locked packages (some minutes the first time)" >&2
[[ ! -s $torch ]] || "${pip[@]}" install "${quiet[@]}" -r "$torch" 2>"$first_try" \
  || "${pip[@]}" install "${quiet[@]}" --index-url "$torch_index" -r "$torch" \
  || { echo "setup: the configured index had said:" >&2; cat "$first_try" >&2; exit 1; }
"${pip[@]}" install "${quiet[@]}" -r "$lock"
[[ $# -gt 2 ]] || "${pip[@]}" install --quiet --no-deps --no-build-isolation --editable .

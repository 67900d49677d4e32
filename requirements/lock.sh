#!/usr/bin/env bash
# Resolve pyproject.toml's extras into requirements/cpu.lock, with hashes and without any host name.
#   requirements/lock.sh PYTHON
# uv does the resolving (in an environment of its own). It needs torch's CPU wheel from a folder or an index:
# FIND_LINKS=folder or UV_EXTRA_INDEX_URL=... if the default index does not have it.
set -euo pipefail
python=$1
command -v "$python" >/dev/null || python=python3
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"$python" -m venv "$tools"
"$tools/bin/pip" install --quiet --disable-pip-version-check uv
links=()
for folder in ${FIND_LINKS:-${PIP_FIND_LINKS:-}}; do links+=(--find-links "$folder"); done
"$tools/bin/uv" pip compile pyproject.toml \
  --extra train --extra cpu --extra bench --extra dev \
  --override requirements/overrides.txt \
  --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
  --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --quiet \
  "${links[@]}" --output-file "$tools/cpu.lock" >/dev/null
# A resolver that finds no CPU wheel takes the CUDA build, which no lock of ours may name.
grep -qE '^torch==[0-9.]+\+cpu' "$tools/cpu.lock" \
  || { echo "lock: expected torch's CPU wheel, found $(grep '^torch==' "$tools/cpu.lock"). Set FIND_LINKS." >&2; exit 1; }
mv "$tools/cpu.lock" requirements/cpu.lock
echo "lock: $(grep -cE '^[a-z0-9].*==' requirements/cpu.lock) packages in requirements/cpu.lock" >&2

#!/usr/bin/env bash
# Resolve pyproject.toml's extras, and clients.in, into requirements/*.lock, with hashes and without any host name.
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
compile() { # LOCK SOURCE ARGUMENTS...: uv's way to say what all locks share
  "$tools/bin/uv" pip compile "$2" --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --quiet \
    --output-file "$tools/$1" "${@:3}" >/dev/null
  # Comments name the constraint by where it lies for the moment.
  sed -i "s#$tools/#requirements/#" "$tools/$1"
  echo "lock: $(grep -cE '^[a-z0-9].*==' "$tools/$1") packages in requirements/$1" >&2
}
compile cpu.lock pyproject.toml --extra train --extra cpu --extra bench --extra eval --extra gguf --extra ray --extra docs --extra dev --override requirements/overrides.txt \
  "${links[@]}"
# A resolver that finds no CPU wheel takes the CUDA build, which no lock of ours may name.
grep -qE '^torch==[0-9.]+\+cpu' "$tools/cpu.lock" \
  || { echo "lock: expected torch's CPU wheel, found $(grep '^torch==' "$tools/cpu.lock"). Set FIND_LINKS." >&2; exit 1; }
# Packages that the images serve with: no training, no tests; GGUF files are read; the same versions.
compile serve-cpu.lock pyproject.toml --extra cpu --extra gguf --override requirements/overrides.txt --constraint "$tools/cpu.lock" "${links[@]}"
# Without the folders of CPU wheels: the index's torch is the CUDA build.
compile serve-cuda.lock pyproject.toml --extra cuda --extra gguf --no-config
if grep -qE '^torch==.*\+cpu' "$tools/serve-cuda.lock"; then
  echo "lock: expected torch's CUDA build in serve-cuda.lock, found $(grep '^torch==' "$tools/serve-cuda.lock")" >&2
  exit 1
fi
# Other people's clients of `make clients`: an environment of their own, without torch.
compile clients.lock requirements/clients.in --no-config
# AMD's kernels, added to an environment of cpu.lock, which has all else that they need.
compile zen.lock requirements/zen.in --no-config --no-deps
mv "$tools"/*.lock requirements/

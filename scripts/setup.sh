#!/usr/bin/env bash
# Creates .venv with the pinned dependencies and the project in it; does nothing when that is already so.
#   scripts/setup.sh [cpu|cuda|rocm|vulkan|metal]   default: what .venv was made for, else cpu
#   scripts/setup.sh --missing                      prints the Debian packages that are missing, if any
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
stamp=.venv/.ready

missing() {
  local packages=()
  "$python" -c 'import venv, ensurepip' 2>/dev/null || packages+=(python3-venv)
  command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || packages+=(build-essential)
  command -v cmake >/dev/null || packages+=(cmake)
  echo "${packages[*]}"
}

fail() {
  echo "make setup: $1" >&2
  exit 1
}

if [ "${1:-}" = --missing ]; then
  missing
  exit 0
fi

gpu=${1:-$(cat "$stamp" 2>/dev/null || echo cpu)}
case "$gpu" in
  cpu) cmake_args="" ;;
  cuda) cmake_args="-DGGML_CUDA=on" ;;
  rocm) cmake_args="-DGGML_HIP=on" ;;
  vulkan) cmake_args="-DGGML_VULKAN=on" ;;
  metal) cmake_args="-DGGML_METAL=on" ;;
  *) fail "GPU=$gpu is not known; use GPU=cuda, rocm, vulkan, metal or cpu" ;;
esac

built=$(cat "$stamp" 2>/dev/null || true)
if [ "$built" = "$gpu" ] && [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints.txt ]; then
  exit 0
fi

packages=$(missing)
[ -z "$packages" ] || fail "missing: $packages; install with: sudo apt-get install -y $packages"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$("$python" --version) is too old; name a Python >= 3.10 with: make setup PYTHON=python3.11"

echo "make setup: installing into .venv ($gpu); the first time llama.cpp is compiled, which takes some minutes" >&2
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check --quiet)
if [ "$gpu" != "${built:-cpu}" ]; then  # the wheel in place, and the one in pip's cache, may be of another backend
  cached=(--no-cache-dir)
  [ "$gpu" != cpu ] || cached=()
  CMAKE_ARGS="$cmake_args" "${pip[@]}" install "${cached[@]}" --force-reinstall --no-deps --constraint constraints.txt llama-cpp-python
fi
CMAKE_ARGS="$cmake_args" "${pip[@]}" install --constraint constraints.txt --editable '.[dev,hub,plot]'
echo "$gpu" >"$stamp"

#!/usr/bin/env bash
# Creates .venv beside this script and installs the pinned requirements. Safe to repeat; needs no sudo, compiler or GPU.
#   bash setup_mouse_env.sh [--extra] [--gpu]
#     --extra   also requirements-extra.txt (viewer, web demo, experiment tracking)
#     --gpu     also check what the CUDA rasterizer (gsplat) needs, and say what is missing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

extra=0 gpu=0
for argument in "$@"; do
  case "$argument" in
    --extra) extra=1 ;;
    --gpu) gpu=1 ;;
    -h | --help) sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "setup_mouse_env.sh: unknown option '$argument' (known: --extra, --gpu)" >&2; exit 2 ;;
  esac
done

find_python() {
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
      echo "$candidate"; return
    fi
  done
  echo "setup_mouse_env.sh: Python 3.11 or 3.12 with venv is needed; install one or set PYTHON=/path/to/python3.11" >&2
  exit 1
}

if [ ! -x .venv/bin/python ]; then
  python="$(find_python)"
  echo "creating .venv with $("$python" --version)"
  "$python" -m venv .venv
fi

files=(requirements.txt)
if [ "$extra" = 1 ]; then files+=(requirements-extra.txt); fi
for file in "${files[@]}"; do
  # The stamp holds the content that was installed: an unchanged file costs nothing, a changed pin is installed.
  stamp=".venv/.installed-$file"
  if cmp -s "$file" "$stamp"; then
    echo "$file: already installed"
  else
    echo "installing $file (PyTorch is most of it: some 7 GB on disk, a minute or two on a fast connection)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$file"
    cp "$file" "$stamp"
  fi
done
.venv/bin/python -c 'import torch, torchvision; print(f"torch {torch.__version__}, torchvision {torchvision.__version__} import")'

if [ "$gpu" = 1 ]; then
  missing=0
  report() { echo "gpu: missing: $1" >&2; missing=1; }
  command -v nvidia-smi >/dev/null || report "the NVIDIA driver (nvidia-smi is not on the PATH)"
  .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
    || report "a CUDA device that torch sees (torch.cuda.is_available() is False)"
  if ! .venv/bin/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("gsplat.csrc") is None)' 2>/dev/null; then
    cuda_home="${CUDA_HOME:-/usr/local/cuda}"
    [ -x "$cuda_home/bin/nvcc" ] || report "nvcc in \$CUDA_HOME/bin ($cuda_home/bin): install the CUDA toolkit and export CUDA_HOME"
    command -v g++ >/dev/null || report "g++, which nvcc needs to compile gsplat on its first use"
  fi
  [ "$missing" = 0 ] || { echo "gpu: not ready; everything else works on the CPU" >&2; exit 1; }
  echo "gpu: ready (gsplat compiles on its first use unless a prebuilt gsplat/csrc is installed)"
fi

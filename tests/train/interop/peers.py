"""Another library reads our files, and writes its own, in its own environment: started by test_peers with that Python.

python peers.py LIBRARY read FOLDER    of every folder in it: exported/ as the library loads it, x.pt -> f.pt, y.pt
python peers.py LIBRARY write FOLDER   a folder for every class in FOLDER, with x.pt, f.pt, y.pt

Nothing of this project is imported.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

D, L, B, K = 12, 40, 30, 5
Given = tuple[Tensor, Tensor]  # codes, and rows


def dictionary_learning_read(folder: Path, x: Tensor) -> Given:
    from dictionary_learning.utils import load_dictionary

    made, _ = load_dictionary(str(folder), "cpu")
    f = made.encode(x)
    return f, made.decode(f)


def dictionary_learning_write(folder: Path) -> Iterator[tuple[Path, Tensor, Given]]:
    from dictionary_learning import dictionary, trainers
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE

    top_k = sys.modules[trainers.TopKTrainer.__module__].AutoEncoderTopK
    batch = sys.modules[trainers.BatchTopKTrainer.__module__].BatchTopKSAE
    classes: dict[str, Callable[[], Any]] = {
        "AutoEncoder": lambda: dictionary.AutoEncoder(D, L), "AutoEncoderNew": lambda: dictionary.AutoEncoderNew(D, L),
        "GatedAutoEncoder": lambda: dictionary.GatedAutoEncoder(D, L),
        "JumpReluAutoEncoder": lambda: dictionary.JumpReluAutoEncoder(D, L),
        "AutoEncoderTopK": lambda: top_k(D, L, K), "BatchTopKSAE": lambda: batch(D, L, K),
        "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D, L, K, [10, 30]),
    }  # fmt: skip
    for name, make in classes.items():
        made, x = randomised(make()), torch.randn(B, D)
        place = folder / name
        place.mkdir()
        torch.save(made.state_dict(), place / "ae.pt")
        (place / "config.json").write_text(f'{{"trainer": {{"dict_class": "{name}", "k": {K}}}}}')
        f = made.encode(x)
        yield place, x, (f, made.decode(f))


def sae_lens_read(folder: Path, x: Tensor) -> Given:
    from sae_lens import SAE

    try:
        made: Any = SAE.load_from_disk(folder)
    except ValueError:  # a transcoder is loaded by its own class
        from sae_lens import Transcoder

        made = Transcoder.load_from_disk(folder)
    return made.encode(x), made(x)


def sae_lens_write(folder: Path) -> Iterator[tuple[Path, Tensor, Given]]:
    from sae_lens import registry

    for name in ("standard", "gated", "jumprelu", "topk", "transcoder", "skip_transcoder", "jumprelu_transcoder"):
        kind, config = registry.get_sae_class(name)
        asked: dict[str, Any] = {"d_in": D, "d_sae": L}
        asked |= {"k": K, "rescale_acts_by_decoder_norm": True} if name == "topk" else {}
        asked |= {"d_out": D + 3, "apply_b_dec_to_input": False} if "transcoder" in name else {}
        made, x = randomised(kind(config(**asked))), torch.randn(B, D)
        made.save_model(folder / name)
        yield folder / name, x, (made.encode(x), made(x))
    from sae_lens.saes import batchtopk_sae

    made = randomised(batchtopk_sae.BatchTopKTrainingSAE(batchtopk_sae.BatchTopKTrainingSAEConfig(D, L, k=float(K))))
    made.topk_threshold.fill_(1.5)
    made.save_model(folder / "batchtopk")
    made.save_inference_model(folder / "batchtopk_inference")
    from sae_lens import SAE

    loaded: Any = SAE.load_from_disk(folder / "batchtopk_inference")
    x = torch.randn(B, D)
    yield folder / "batchtopk", x, (loaded.encode(x), loaded(x))
    yield folder / "batchtopk_inference", x, (loaded.encode(x), loaded(x))


def sparsify_read(folder: Path, x: Tensor) -> Given:
    from sparsify import SparseCoder

    return of_sparsify(SparseCoder.load_from_disk(folder), x)


def of_sparsify(made: Any, x: Tensor) -> Given:
    found = made.encode(x)
    f = torch.zeros(len(x), made.num_latents).scatter_(1, found.top_indices, found.top_acts)
    return f, made(x).sae_out


def sparsify_write(folder: Path) -> Iterator[tuple[Path, Tensor, Given]]:
    from sparsify import SparseCoder, SparseCoderConfig

    for name, asked in [("sae", {}), ("transcoder", {"transcode": True, "skip_connection": True})]:
        made, x = randomised(SparseCoder(D, SparseCoderConfig(num_latents=L, k=K, **asked))), torch.randn(B, D)
        made.save_to_disk(folder / name)
        yield folder / name, x, of_sparsify(made, x)


def randomised(made: Any) -> Any:
    """With weights, biases and thresholds that all count."""
    with torch.no_grad():
        for name, value in made.named_parameters():
            value.copy_(torch.randn(value.shape) * 0.5)
            if name == "threshold":
                value.abs_()
        for name, value in made.named_buffers():
            if name == "threshold":
                value.fill_(0.8)
    return made.eval()


LIBRARIES: dict[str, tuple[Callable[..., Given], Callable[..., Iterator[tuple[Path, Tensor, Given]]]]] = {
    "dictionary-learning": (dictionary_learning_read, dictionary_learning_write),
    "sae-lens": (sae_lens_read, sae_lens_write), "eai-sparsify": (sparsify_read, sparsify_write),
}  # fmt: skip


def keep(folder: Path, given: Given) -> None:
    torch.save(given[0].detach(), folder / "f.pt")
    torch.save(given[1].detach(), folder / "y.pt")


@torch.no_grad()
def main() -> None:
    library, way, place = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    torch.manual_seed(0)
    reads, writes = LIBRARIES[library]
    if way == "read":
        for folder in sorted(place.iterdir()):
            keep(folder, reads(folder / "exported", torch.load(folder / "x.pt")))
        return
    for folder, x, given in writes(place):
        torch.save(x, folder / "x.pt")
        keep(folder, given)


if __name__ == "__main__":
    main()

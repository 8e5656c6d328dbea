"""Stage 2: train dictionaries on a store. Four verbs: Store.open, fit, Dictionary.load, dictionary.encode.

open_family reads a store as one with those that it extends, open_mixture several stores as one; stage copies one from a
URL; resume goes on with a run. sweep trains several at once, and resume_sweep goes on with them. difference names the
source that is one less another; batches reads rows for loops of your own.
"""

from shared.family import open_family
from shared.mixture import open_mixture
from shared.staging import stage
from shared.store import Store
from train.batches import Batches, batches
from train.dictionary import Dictionary
from train.fit import fit, resume, resume_sweep, sweep
from train.sources import difference

__all__ = [
    "Batches", "Dictionary", "Store", "batches", "difference", "fit", "open_family", "open_mixture", "resume",
    "resume_sweep", "stage", "sweep",
]  # fmt: skip

"""Stage 2: train dictionaries on a store. Four verbs: Store.open, fit, Dictionary.load, dictionary.encode.

open_family reads a store as one with those that it extends; stage copies one from a URL; resume goes on with a run;
batches reads rows for loops of your own.
"""

from shared.family import open_family
from shared.remote import stage
from shared.store import Store
from train.batches import Batches, batches
from train.dictionary import Dictionary
from train.fit import fit, resume

__all__ = ["Batches", "Dictionary", "Store", "batches", "fit", "open_family", "resume", "stage"]

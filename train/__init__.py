"""Stage 2: train dictionaries on a store. Four verbs: Store.open, fit, Dictionary.load, dictionary.encode."""

from shared.remote import stage
from shared.store import Store
from train.dictionary import Dictionary
from train.fit import fit

__all__ = ["Dictionary", "Store", "fit", "stage"]

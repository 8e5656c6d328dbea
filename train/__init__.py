"""Stage 2: train dictionaries on a store. Four verbs: Store.open, fit, Dictionary.load, dictionary.encode.

open_family reads a store as one with those that it extends; stage copies one from a URL; resume goes on with a run.
sweep trains several at once, and resume_sweep goes on with them.
"""

from shared.family import open_family
from shared.remote import stage
from shared.store import Store
from train.dictionary import Dictionary
from train.fit import fit, resume, resume_sweep, sweep

__all__ = ["Dictionary", "Store", "fit", "open_family", "resume", "resume_sweep", "stage", "sweep"]

"""Dictionaries of other libraries: `load` reads theirs, `export` makes the files of ours that they read."""

from train.interop.formats import export, load

__all__ = ["export", "load"]

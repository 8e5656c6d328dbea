"""The names of dictionary_learning, crosscoder_learning and dfc_learning, on dictionaries of ours.

`from train.interop.dictionary_learning import AutoEncoder` instead of `from dictionary_learning import AutoEncoder`.
"""

from train.interop.dictionary_learning.autoencoders import (
    AutoEncoder,
    AutoEncoderNew,
    AutoEncoderTopK,
    BatchTopKSAE,
    GatedAutoEncoder,
    IdentityDict,
    JumpReluAutoEncoder,
    MatryoshkaBatchTopKSAE,
)
from train.interop.dictionary_learning.crosscoders import (
    BatchTopKCrossCoder,
    CodeNormalization,
    CrossCoder,
    CrossCoderDecoder,
    CrossCoderEncoder,
)
from train.interop.dictionary_learning.dedicated import (
    DedicatedFeatureBatchTopKCrossCoder,
    DedicatedFeatureCrossCoder,
)
from train.interop.dictionary_learning.loading import load_dictionary
from train.interop.dictionary_learning.partition import FeaturePartition
from train.interop.dictionary_learning.shaped import Dictionary

__all__ = [
    "AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKCrossCoder", "BatchTopKSAE", "CodeNormalization",
    "CrossCoder", "CrossCoderDecoder", "CrossCoderEncoder", "DedicatedFeatureBatchTopKCrossCoder",
    "DedicatedFeatureCrossCoder", "Dictionary", "FeaturePartition", "GatedAutoEncoder", "IdentityDict",
    "JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE", "load_dictionary",
]  # fmt: skip

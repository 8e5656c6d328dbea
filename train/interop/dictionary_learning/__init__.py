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
from train.interop.dictionary_learning.buffers import (
    ActivationBuffer,
    HeadActivationBuffer,
    NNsightActivationBuffer,
)
from train.interop.dictionary_learning.caches import (
    ActivationCache,
    ActivationCacheTuple,
    PairedActivationCache,
    RunningStatWelford,
)
from train.interop.dictionary_learning.crosscoders import (
    BatchTopKCrossCoder,
    CodeNormalization,
    CrossCoder,
    CrossCoderDecoder,
    CrossCoderEncoder,
)
from train.interop.dictionary_learning.crossing import BatchTopKCrossCoderTrainer, CrossCoderTrainer
from train.interop.dictionary_learning.dedicated import (
    DedicatedFeatureBatchTopKCrossCoder,
    DedicatedFeatureCrossCoder,
)
from train.interop.dictionary_learning.evaluation import evaluate, loss_recovered
from train.interop.dictionary_learning.loading import load_dictionary
from train.interop.dictionary_learning.loose import ConstrainedAdam
from train.interop.dictionary_learning.partition import FeaturePartition
from train.interop.dictionary_learning.shaped import Dictionary
from train.interop.dictionary_learning.trainer import LossLog, Trainer
from train.interop.dictionary_learning.trainers import (
    BatchTopKTrainer,
    GatedAnnealTrainer,
    GatedSAETrainer,
    JumpReluTrainer,
    MatryoshkaBatchTopKTrainer,
    PAnnealTrainer,
    SAETrainer,
    StandardTrainer,
    StandardTrainerAprilUpdate,
    TopKTrainer,
    TrainerJumpRelu,
    TrainerTopK,
)
from train.interop.dictionary_learning.training import trainSAE

__all__ = [
    "ActivationBuffer", "ActivationCache", "ActivationCacheTuple", "AutoEncoder", "AutoEncoderNew",
    "AutoEncoderTopK", "BatchTopKCrossCoder", "BatchTopKCrossCoderTrainer", "BatchTopKSAE", "BatchTopKTrainer",
    "CodeNormalization", "ConstrainedAdam", "CrossCoder", "CrossCoderDecoder", "CrossCoderEncoder",
    "CrossCoderTrainer", "DedicatedFeatureBatchTopKCrossCoder", "DedicatedFeatureCrossCoder", "Dictionary",
    "FeaturePartition", "GatedAnnealTrainer", "GatedAutoEncoder", "GatedSAETrainer", "HeadActivationBuffer",
    "IdentityDict", "JumpReluAutoEncoder", "JumpReluTrainer", "LossLog", "MatryoshkaBatchTopKSAE",
    "MatryoshkaBatchTopKTrainer", "NNsightActivationBuffer", "PAnnealTrainer", "PairedActivationCache",
    "RunningStatWelford", "SAETrainer", "StandardTrainer", "StandardTrainerAprilUpdate", "TopKTrainer", "Trainer",
    "TrainerJumpRelu", "TrainerTopK", "evaluate", "load_dictionary", "loss_recovered", "trainSAE",
]  # fmt: skip

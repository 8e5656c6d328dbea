"""Live buffers over nnsight's LanguageModel, in an environment that has nnsight: started by test_buffers.

python nnsight_rows.py MODEL_FOLDER
"""

import json
import sys

import torch
from nnsight import LanguageModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from train.interop.dictionary_learning import ActivationBuffer, NNsightActivationBuffer, loss_recovered
from train.interop.dictionary_learning.autoencoders import IdentityDict

TEXTS = [f"text {number} of some words, and some more of them" for number in range(20)]


def main() -> None:
    folder = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    wrapped = LanguageModel(plain, tokenizer=tokenizer)
    sizes = {"n_ctxs": 8, "ctx_len": 16, "refresh_batch_size": 4, "out_batch_size": 32}
    found = []
    for kind in (ActivationBuffer, NNsightActivationBuffer):
        of_nnsight = list(kind(iter(TEXTS), wrapped, wrapped.gpt_neox.layers[1], **sizes))
        of_plain = list(kind(iter(TEXTS), plain, plain.gpt_neox.layers[1], tokenizer=tokenizer, **sizes))
        found.append(len(of_plain) > 2 and all(torch.equal(a, b) for a, b in zip(of_nnsight, of_plain, strict=True)))
    original, same, zero = loss_recovered(TEXTS, wrapped, wrapped.gpt_neox.layers[1], IdentityDict())
    print(json.dumps({"rows": found, "same": abs(original - same) < 1e-5, "zero": abs(original - zero) > 1e-3}))


if __name__ == "__main__":
    main()

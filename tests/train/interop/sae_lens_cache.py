"""SAELens' CacheActivationsRunner over a small model of TransformerLens: started by test_peers with SAELens' Python.

python sae_lens_cache.py TOKENIZER_FOLDER OUT    it writes OUT/cache; OUT/rows.pt and OUT/tokens.pt are of the model
"""

import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from sae_lens import cache_activations_runner
from sae_lens.config import CacheActivationsRunnerConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoTokenizer

CONTEXT, WIDTH, HOOK = 8, 16, "blocks.1.hook_resid_post"


def main() -> None:
    tokenizer, out = AutoTokenizer.from_pretrained(sys.argv[1]), Path(sys.argv[2])
    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=2,
        d_model=WIDTH,
        n_ctx=CONTEXT,
        d_head=8,
        n_heads=2,
        act_fn="gelu",
        d_vocab=len(tokenizer),
        device="cpu",
    )
    model = HookedTransformer(config, tokenizer=tokenizer)
    tokens = torch.randint(0, len(tokenizer), (40, CONTEXT))
    records = datasets.Dataset.from_dict({"input_ids": tokens.tolist()})
    records.save_to_disk(str(out / "records"))
    asked = CacheActivationsRunnerConfig(
        dataset_path=str(out / "records"), model_name="small", model_batch_size=4, hook_name=HOOK, d_in=WIDTH,
        training_tokens=32 * CONTEXT, context_size=CONTEXT, new_cached_activations_path=str(out / "cache"),
        shuffle=False, device="cpu", buffer_size_gb=16 * CONTEXT * WIDTH * 4 / 1e9, prepend_bos=False, streaming=False,
    )  # fmt: skip
    runner: Any = cache_activations_runner
    runner.load_model = lambda **given: model  # by its name it would come from the hub
    runner.CacheActivationsRunner(asked, override_dataset=records).run()
    found = datasets.load_from_disk(str(out / "cache")).with_format("torch")
    kept = found["token_ids"][:]
    _, seen = model.run_with_cache(kept)
    torch.save(seen[HOOK].reshape(-1, WIDTH), out / "rows.pt")
    torch.save(kept.reshape(-1), out / "tokens.pt")


if __name__ == "__main__":
    main()

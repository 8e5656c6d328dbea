"""Tiny random-weight models with tokenizers trained here, saved to a folder as a checkpoint from the hub would be."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

CONTEXT = 64

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it jumps again; nobody knows why.",
    "In 1989, 1990 and 2001 there were 198 of 9 things (and 1,234.56 others).\n\n    indented\ttext  with   runs \n",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2  # of a disc\n\n\nprint(area(10))\n",
    "naïve café, Zoë's déjà vu: “quoted” … and cafe\u0301 with a combining accent.",
    "日本語の文章と中文句子。 한국어 문장도 있다. Русский текст. عربى",
    "Emoji: 😀👍🏽 👨‍👩‍👧 🇫🇷 and then words follow as before, the words of the text.",
    "a",
    "It is what it is. It was what it was. It will be what it will be, as it is and was.\n" * 12,
)


@dataclass(frozen=True)
class Spelling:
    """A fast tokenizer and the roles of its special tokens, such as {"bos_token": "<s>"}."""

    backend: Tokenizer
    roles: dict[str, str]

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self.roles}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    def load(self, folder: Path) -> PreTrainedTokenizerBase:
        """As transformers loads it from `folder`, where it is saved first."""
        return AutoTokenizer.from_pretrained(self.save(folder))


def _lines() -> Iterator[str]:
    """English from Python's help topics, and the letters of TEXTS."""
    from pydoc_data import topics

    yield from TEXTS
    for name in sorted(topics.topics)[:20]:
        yield from str(topics.topics[name]).splitlines(keepends=True)


@cache
def byte_level(size: int = 400, trim_offsets: bool = False, prefix_space: bool = False) -> Spelling:
    """Like GPT-2's: BPE over bytes, no token added around a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, trim_offsets=trim_offsets)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    end = "<|endoftext|>"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)  # type: ignore[call-arg]
    backend.train_from_iterator(_lines(), trainer)
    return Spelling(backend, {"eos_token": end})


@cache
def sentencepiece(size: int = 600, prepend: bool = False) -> Spelling:
    """Like Gemma's: BPE over characters with ' ' -> '▁', bytes for rare ones, and a BOS. `prepend`: like Llama 2's."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁\n]+|\n+|▁+"), "isolated")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=size - 256, special_tokens=special, limit_alphabet=90, show_progress=False)  # type: ignore[call-arg]
    learner.train_from_iterator(_lines(), trainer)
    learned = json.loads(learner.to_str())["model"]
    words = [word for word, _ in sorted(learned["vocab"].items(), key=lambda item: item[1]) if word not in special]
    vocabulary = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [tuple(pair) for pair in learned["merges"]]
    numbered = {word: index for index, word in enumerate(vocabulary)}
    backend = Tokenizer(models.BPE(numbered, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return Spelling(backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


@cache
def wordpiece(size: int = 500, lower: bool = True) -> Spelling:
    """Like BERT's: pieces of words, white space in none of them, [CLS] before and [SEP] behind."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    backend.train_from_iterator(_lines(), trainer)
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return Spelling(backend, {**roles, "mask_token": "[MASK]"})


def hand_made(words: list[str], bos: bool = False) -> Spelling:
    """Splits a text into `words`, the longest from the left. A text with anything else is not spelled."""
    special = ["<s>"] if bos else []
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    either = "|".join(sorted(map(_escaped, words), key=len, reverse=True))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(either), "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    if bos:
        backend.add_special_tokens(special)
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return Spelling(backend, {"bos_token": "<s>"} if bos else {})


def _escaped(word: str) -> str:
    return "".join(letter if letter.isalnum() else f"\\{letter}" for letter in word)


Make = Callable[..., Any]


def _common(vocabulary: int, width: int, layers: int, context: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4,
        "intermediate_size": 2 * width, "max_position_embeddings": context, "initializer_range": 0.15,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip


def _llama(common: dict[str, Any]) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, num_key_value_heads=2))


def _gemma3(common: dict[str, Any]) -> Any:
    kinds = [
        "sliding_attention" if number % 2 == 0 else "full_attention" for number in range(common["num_hidden_layers"])
    ]
    config = transformers.Gemma3TextConfig(
        **common, num_key_value_heads=1, head_dim=8, sliding_window=8, layer_types=kinds, query_pre_attn_scalar=8
    )
    return transformers.Gemma3ForCausalLM(config)


def _qwen3(common: dict[str, Any]) -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common, num_key_value_heads=2, head_dim=8))


def _gpt2(common: dict[str, Any]) -> Any:
    config = transformers.GPT2Config(
        vocab_size=common["vocab_size"], n_embd=common["hidden_size"], n_layer=common["num_hidden_layers"], n_head=4,
        n_inner=common["intermediate_size"], n_positions=common["max_position_embeddings"], initializer_range=0.15,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _gpt_neox(common: dict[str, Any]) -> Any:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**common))


def _bert(common: dict[str, Any]) -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**{**common, "pad_token_id": 0}))


FAMILIES: dict[str, Make] = {
    "llama": _llama, "gemma3": _gemma3, "qwen3": _qwen3, "gpt2": _gpt2, "gpt_neox": _gpt_neox, "bert": _bert,
}  # fmt: skip


def save_model(
    folder: Path, family: str, tokenizer: Spelling, seed: int = 0, width: int = 32, layers: int = 3,
    context: int = CONTEXT, dtype: torch.dtype = torch.float32,
) -> Path:  # fmt: skip
    """A model of `family` with its language-model head and `tokenizer`. Norms and biases are random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[family](_common(tokenizer.backend.get_vocab_size(), width, layers, context))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return tokenizer.save(folder)

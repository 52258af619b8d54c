"""Tokenizers with the habits of published families, made in code around the templates of ``tests/assets``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parents[2] / "assets" / "chat_templates"
CORPUS = [
    "Name a colour. Blue, of course.\n\nAnd another? \n\n\nWhy: the sky is blue; the sea is, too.",
    "user\nassistant\nsystem\n You are a helpful assistant. [INST] [/INST] <<SYS>> USER: ASSISTANT:",
    "<think>\n</think>\n\n",
    "1234 words, and more words: the, a, of, to, in. yes no maybe  two  blanks",
]
# Control tokens, BOS and EOS of each family; a BOS that the tokenizer adds by itself is marked with a plus.
FAMILIES: dict[str, tuple[str, str, str]] = {
    "llama-2": ("<unk> <s> </s>", "+<s>", "</s>"),
    "llama-3": (
        "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
        "+<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "mistral": ("<unk> <s> </s> [INST] [/INST]", "+<s>", "</s>"),
    "gemma": ("<pad> <eos> <bos> <unk> <start_of_turn> <end_of_turn>", "+<bos>", "<eos>"),
    "phi-3": ("<unk> <s> </s> <|endoftext|> <|user|> <|assistant|> <|end|> <|system|>", "<s>", "<|endoftext|>"),
    "qwen-2": ("<|endoftext|> <|im_start|> <|im_end|>", "", "<|im_end|>"),
    "qwen-3": ("<|endoftext|> <|im_start|> <|im_end|>", "", "<|im_end|>"),
    "deepseek-r1": ("<|begin|> <|end|> <|User|> <|Assistant|>", "+<|begin|>", "<|end|>"),
    "chatml": ("<s> </s> <|im_start|> <|im_end|>", "+<s>", "</s>"),
    "zephyr": ("<unk> <s> </s>", "+<s>", "</s>"),
    "vicuna": ("<unk> <s> </s>", "+<s>", "</s>"),
    "command-r": (
        "<PAD> <BOS_TOKEN> <EOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> "
        "<|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|>",
        "+<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "granite": ("<|end_of_text|> <|start_of_role|> <|end_of_role|>", "<|end_of_text|>", "<|end_of_text|>"),
    "olmo-tulu": ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "smollm": ("<|endoftext|> <|im_start|> <|im_end|>", "<|im_start|>", "<|im_end|>"),
}
# Families whose templates have a place for tools, thoughts or parts of a content.
TOOL_FAMILIES: dict[str, tuple[str, str, str]] = {
    "qwen-2.5": ("<|endoftext|> <|im_start|> <|im_end|>", "", "<|im_end|>"),
    "qwen-3-tools": ("<|endoftext|> <|im_start|> <|im_end|>", "", "<|im_end|>"),
    "llama-3.1": (
        "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|>",
        "+<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "mistral-tools": (
        "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] "
        "[/TOOL_RESULTS]",
        "+<s>",
        "</s>",
    ),
    "smollm-3": ("<|endoftext|> <|im_start|> <|im_end|>", "", "<|im_end|>"),
    "deepseek-v3": (
        "<|begin|> <|end|> <|User|> <|Assistant|> <|tool_calls_begin|> <|tool_calls_end|> <|tool_call_begin|> "
        "<|tool_call_end|> <|tool_sep|> <|tool_outputs_begin|> <|tool_outputs_end|> <|tool_output_begin|> "
        "<|tool_output_end|>",
        "+<|begin|>",
        "<|end|>",
    ),
    "gpt-oss": (
        "<|startoftext|> <|start|> <|end|> <|message|> <|channel|> <|call|> <|return|>",
        "<|startoftext|>",
        "<|return|>",
    ),
    "glm-4.5": ("<|endoftext|> [gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>", "", "<|endoftext|>"),
    "gemma-3": ("<pad> <eos> <bos> <unk> <start_of_turn> <end_of_turn> <start_of_image>", "+<bos>", "<eos>"),
    "granite-3.3": (
        "<|end_of_text|> <|start_of_role|> <|end_of_role|> <|tool_call|>",
        "<|end_of_text|>",
        "<|end_of_text|>",
    ),
}
EVERY_FAMILY = {**FAMILIES, **TOOL_FAMILIES}
# What ends a turn where that is not the EOS: the chat template's own.
ENDS = {"gemma": "<end_of_turn>", "phi-3": "<|end|>", "chatml": "<|im_end|>"}
KINDS = ("bytes", "merges", "words", "unigram")


@functools.cache
def tokenizer(family: str, kind: str = "bytes") -> PreTrainedTokenizerFast:
    """The tokenizer of a family, ``gpt2`` (no template) and ``noeos`` (no template, no end) among them.

    Args:
        family: a name in ``EVERY_FAMILY``.
        kind: ``bytes`` (one token a byte), ``merges`` (byte-level, trained), ``words`` (as SentencePiece's BPE: a blank
            before the text, bytes for what is unknown), ``unigram`` (control tokens are pieces of the vocabulary).
    """
    names, bos, eos = EVERY_FAMILY.get(family, ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>"))
    if family == "noeos":
        names, bos, eos = "<pad>", "", ""
    backend = _backend(kind, names.split())
    if bos.startswith("+"):
        bos = bos[1:]
        number = backend.token_to_id(bos)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, number)]
        )
    given: dict[str, Any] = {"bos_token": bos, "eos_token": eos}
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in given.items() if token},
    )
    if family in EVERY_FAMILY:
        made.chat_template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return made


def _backend(kind: str, special: list[str]) -> Tokenizer:
    if kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
        alphabet = [chr(code) for code in range(33, 127)]
        trainer = UnigramTrainer(
            vocab_size=300, special_tokens=["<unk>", *special], unk_token="<unk>", initial_alphabet=alphabet
        )
        backend.train_from_iterator(CORPUS, trainer)
    elif kind == "words":
        alphabet = ["▁", *(chr(code) for code in range(33, 127))]
        bytes_ = [f"<0x{code:02X}>" for code in range(256)]
        words = dict.fromkeys(["<unk>", *special, *bytes_, *alphabet, "▁a", "▁th", "▁the"])
        merges = [("▁", "a"), ("▁", "t"), ("▁t", "h"), ("▁th", "e")]
        words |= {"▁t": None}
        backend = Tokenizer(
            models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
        )
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({w: i for i, w in enumerate([*special, *alphabet])}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "merges")
        backend.decoder = decoders.ByteLevel()
        if kind == "merges":
            trainer = BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
            backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return backend

"""A tiny Llama, its tokenizer and a tiny reward model, made in code: for tests and dry runs, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

SEED = 20230411
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SPECIAL = (PAD, BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>")

# Like Llama's own, the template writes the BOS that the tokenizer also adds to plain text: who encodes a rendered chat
# with special tokens on gets two of them, and a test that looks. Tools, calls of them and thoughts have a place, so
# that data with them can be tried without a download; the thoughts of an answer alone, as in most families.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if tools %}{{ '<|system|>\nTools:' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}"
    "{{ eos_token + '\n' }}{% endif %}"
    "{% set ns = namespace(user=-1) %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{% set ns.user = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['reasoning_content'] and loop.index0 > ns.user %}"
    "{{ '<think>\n' + message['reasoning_content'] + '\n</think>\n' }}{% endif %}"
    "{{ (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<tool_call>' + call['function'] | tojson + '</tool_call>' }}{% endfor %}"
    "{{ eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: six special tokens, then one token a byte, so any text round-trips."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, words.index(BOS))]
    )
    make: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = make(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=list(SPECIAL[3:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    return tokenizer


def build_model() -> LlamaForCausalLM:
    """A Llama of 2 layers, 4 heads on 2 key-value heads, width 32, context 512, untied; float32, on the CPU."""
    model: LlamaForCausalLM = _seeded(LlamaForCausalLM)
    return model


def build_tiny_reward_model() -> LlamaForSequenceClassification:
    """The same trunk under a scalar head: one reward a sequence, read at its last token that is not padding."""
    model: LlamaForSequenceClassification = _seeded(LlamaForSequenceClassification, num_labels=1)
    return model


def save_policy(folder: Path) -> None:
    """Write the tiny policy and its tokenizer into ``folder``; the same bytes every time."""
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def save_reward_model(folder: Path) -> None:
    """Write the tiny reward model and its tokenizer into ``folder``; the same bytes every time."""
    build_tiny_reward_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def _seeded(architecture: Any, **more: Any) -> Any:
    """A model whose weights come from a generator of their own: no draw of the caller's matters or is used up."""
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = architecture(config)
        generator = torch.Generator().manual_seed(SEED)
        for name, weight in model.named_parameters():
            # Wide enough that logits differ between tokens by tenths of a nat, which tests can tell from rounding.
            scale = 1.0 if "embed_tokens" in name else 0.1
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return model.eval()

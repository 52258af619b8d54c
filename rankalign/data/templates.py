"""Prompt formats that published models were trained on, and the strings that end an answer under each.

``chat`` is not here: it is the tokenizer's own template, see :func:`rankalign.data.encode.encode_prompt`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rankalign.data.messages import Message, Prompt, text_of
from rankalign.errors import InputError
from rankalign.registry import did_you_mean

ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HH_STOPS = ("\n\nHuman:", "\n\nAssistant:", "\n\nhuman:", "\n\nassistant:")
# Where answers begin under published templates. A string prompt that ends in one of these has been rendered already;
# one that only mentions it has not.
OPENINGS = (
    "\n\nAssistant:",
    "\n\nassistant:",
    "### Response:",
    "ASSISTANT:",
    "[/INST]",
    "<|im_start|>assistant",
    "<|start_header_id|>assistant<|end_header_id|>",
    "<start_of_turn>model",
    "<|assistant|>",
    "<|Assistant|>",
    "<\uff5cAssistant\uff5c>",
    "<|CHATBOT_TOKEN|>",
    "<|start_of_role|>assistant<|end_of_role|>",
    "<|start|>assistant",
    "<|turn>model",
)


@dataclass(frozen=True)
class Template:
    """How messages become one string.

    Attributes:
        render: ``(messages, meta) -> text`` that ends where the answer begins.
        stops: strings that end an answer.
        summary: one line for ``rankalign ls``.
    """

    render: Callable[[list[Message], dict[str, Any]], str]
    stops: tuple[str, ...]
    summary: str


def as_messages(prompt: Prompt, system: str = "") -> list[Message]:
    """A prompt as a message list; ``system`` is put first unless the prompt brings its own system message."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _raw(messages: list[Message], meta: dict[str, Any]) -> str:
    return "\n\n".join(text_of(message) for message in messages)


def _alpaca(messages: list[Message], meta: dict[str, Any]) -> str:
    turns = [text_of(message) for message in messages if message["role"] != "system"]
    if len(turns) != 1:
        raise InputError(f"template 'alpaca' takes one user message, found {len(turns)}; use chat or vicuna")
    fields = {"instruction": turns[0], "input": "", **meta.get("alpaca", {})}
    form = ALPACA_INPUT if fields["input"] else ALPACA_NO_INPUT
    return form.format(instruction=fields["instruction"], input=fields["input"])


def _refuse_tools(messages: list[Message], name: str) -> None:
    if any(message["role"] == "tool" for message in messages):
        raise InputError(f"template {name!r} has no place for the results of tools; use chat")


def _vicuna(messages: list[Message], meta: dict[str, Any]) -> str:
    _refuse_tools(messages, "vicuna")
    system = next((text_of(m) for m in messages if m["role"] == "system"), VICUNA_SYSTEM)
    form = {"user": " USER: {}", "assistant": " ASSISTANT: {}</s>"}
    turns = "".join(form[m["role"]].format(text_of(m)) for m in messages if m["role"] in form)
    # An answer that goes on has no end yet.
    return system + (turns.removesuffix("</s>") if _begun(messages) else f"{turns} ASSISTANT:")


def _hh(messages: list[Message], meta: dict[str, Any]) -> str:
    _refuse_tools(messages, "hh")
    names = {"user": "Human", "assistant": "Assistant"}
    turns = "".join(f"\n\n{names[m['role']]}: {text_of(m)}" for m in messages if m["role"] in names)
    system = "".join(text_of(m) for m in messages if m["role"] == "system")
    return f"{system}{turns}" if _begun(messages) else f"{system}{turns}\n\nAssistant:"


def _begun(messages: list[Message]) -> bool:
    """Whether the last turn is an answer that goes on."""
    return bool(messages[-1]["role"] == "assistant")


TEMPLATES: dict[str, Template] = {
    "raw": Template(_raw, (), "the prompt's text as it is"),
    "alpaca": Template(_alpaca, ("### Instruction:", "### Input:"), "Stanford Alpaca, with and without input"),
    "vicuna": Template(_vicuna, ("USER:",), "Vicuna v1.1"),
    "hh": Template(_hh, HH_STOPS, "Anthropic HH dialogues: Human / Assistant"),
}
CHAT = Template(_raw, (), "the tokenizer's own chat template")
NAMES = ("auto", "chat", *TEMPLATES)


def check_name(name: str) -> str:
    """``name`` if it is a known template.

    Raises:
        InputError: it is not.
    """
    if name not in NAMES:
        raise InputError(f"unknown template {name!r}{did_you_mean(name, NAMES)}")
    return name


def stops(name: str) -> tuple[str, ...]:
    """Strings that end an answer under template ``name``; ``chat`` and ``auto`` end by their token alone."""
    return TEMPLATES[name].stops if check_name(name) in TEMPLATES else ()


def render(prompt: Prompt, name: str, system: str = "", meta: dict[str, Any] | None = None) -> str:
    """The text before the answer, for every template but ``chat``.

    A string prompt that has been rendered already (see :data:`OPENINGS`) is taken as it is.
    """
    if isinstance(prompt, str) and not system and is_rendered(prompt):
        return prompt
    return TEMPLATES[check_name(name)].render(as_messages(prompt, system), meta or {})


def is_rendered(prompt: str) -> bool:
    """Whether a string prompt ends where an answer begins under some template: a mention of its marks is no sign."""
    # Templates of models that reason open the thought themselves, behind the mark of the assistant's turn.
    return prompt.rstrip().removesuffix("<think>").rstrip().endswith(OPENINGS)


def cut_at_stop(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """``text`` up to the earliest stop string, white space stripped from both ends if one was found.

    Returns:
        The text and whether a stop string was found.
    """
    found = [position for mark in stop if (position := text.find(mark)) >= 0]
    return (text[: min(found)].strip(), True) if found else (text, False)

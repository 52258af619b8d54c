"""Calls of tools read out of a text that a model wrote, where the model's own template writes them back the same."""

from __future__ import annotations

import re
from typing import Any

from rankalign.data.messages import Message, decoded, thought_in
from rankalign.data.records import CandidateSet, Response
from rankalign.data.render import Answer, Rendering
from rankalign.errors import InputError

# As Hermes, Qwen, SmolLM and their kin write them: an object with name and arguments.
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def parsed(text: str) -> Message | None:
    """A text that ends in calls as the message that it stands for; None where it does not, or holds anything else."""
    found = list(_CALL.finditer(text))
    calls = [_call(match[1]) for match in found]
    if not found or None in calls or _CALL.sub("", text[found[0].start() :]).strip():
        return None
    said = text[: found[0].start()].rstrip("\n")
    message: Message = {"role": "assistant", "content": said}
    if said.startswith("<think>") and (thought := thought_in(said)) and said[: thought[1]].endswith("</think>"):
        inner = said[len("<think>") : thought[1] - len("</think>")]
        message = {"role": "assistant", "content": said[thought[1] :].strip(), "reasoning_content": inner.strip("\n")}
    return {**message, "tool_calls": calls}


def _call(text: str) -> dict[str, Any] | None:
    told = decoded(text)
    if not isinstance(told, dict) or told.keys() != {"name", "arguments"} or not isinstance(told["arguments"], dict):
        return None
    return {"type": "function", "function": told}


def with_calls(rendering: Rendering, prompt: CandidateSet, response: Response) -> Response:
    """A sampled response, with its messages where it calls tools and the template writes them in the tokens drawn.

    Args:
        rendering: how the policy reads.
        prompt: what was answered.
        response: with its tokens.
    """
    message = parsed(response.text) if response.tokens and response.finished else None
    if message is None or response.tokens is None:
        return response
    try:
        _, (ids,) = rendering.answers(prompt.prompt, [Answer("", messages=(message,))], prompt.meta)
    except InputError:
        return response
    if ids[:-1] == list(response.tokens["ids"]):
        response.messages = [message]
    return response

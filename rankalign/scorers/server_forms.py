"""What servers of scores are sent and where their replies hold the score."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from rankalign.errors import InputError
from rankalign.registry import did_you_mean

FIELDS = ("messages", "prompt_messages", "prompt", "response", "text")
"""What stands in braces in a body: lists of messages (the first two), or texts."""
_HOLE = re.compile(r"\{(" + "|".join(FIELDS) + r")\}")
# Rewards as the head gives them: vLLM puts a sigmoid over one output and a softmax over several unless told not to, and
# in float32 a sigmoid makes all rewards above 17 one number.
_RAW = {"use_activation": False}
# Every digit of the states, as they are before a norm of vLLM's; ids are whole, with all the tokens that belong there.
_STATES = {**_RAW, "encoding_format": "base64", "embed_dtype": "float32", "endianness": "little"}
_STATES |= {"add_special_tokens": False}
_WHOLE = {"messages": "{messages}", "add_generation_prompt": False}


@dataclass(frozen=True)
class Form:
    """A kind of request.

    Attributes:
        name: key in :data:`FORMS`.
        chat: the body for messages; None where there is none.
        body: the body for texts, and of ``post`` the only one.
        value: path of the score in the reply.
        states: the reply holds hidden states, of which a head makes the score.
        ends: of those, one for each text that is sent, its last; else one a token.
    """

    name: str
    chat: dict[str, Any] | None
    body: dict[str, Any]
    value: str
    states: bool = False
    ends: bool = False

    @property
    def takes_messages(self) -> bool:
        """Whether messages can be sent as they are."""
        return self.chat is not None

    @property
    def holes(self) -> set[str]:
        """What the body for texts has room for, names of :data:`FIELDS`."""
        return _holes(self.body)

    def body_of(self, messages: bool) -> dict[str, Any]:
        """The body with its holes."""
        return self.chat if messages and self.chat is not None else self.body


# vLLM's, by its documentation of pooling models (classify.md, scoring.md, README.md: Pooling API) and the request
# classes in vllm/entrypoints/pooling. SGLang's /v1/classify has the shape of /classify, without messages.
FORMS = {
    form.name: form
    for form in (
        Form("classify", {**_WHOLE, **_RAW}, {"input": "{text}", **_RAW}, "data.0.probs"),
        Form(
            "pooling",
            {**_WHOLE, "task": "classify", **_RAW},
            {"input": "{text}", "task": "classify", **_RAW},
            "data.0.data",
        ),
        Form("score", None, {"queries": "{prompt}", "documents": "{response}", **_RAW}, "data.0.score"),
        Form("token_embed", None, {"task": "token_embed", **_STATES}, "data", states=True),
        Form("embed", None, {"task": "embed", **_STATES}, "data", states=True, ends=True),
        Form("post", None, {}, ""),
    )
}


def form_of(url: str, name: str, body: Mapping[str, Any] | None, value: str) -> Form:
    """The form for an address.

    Args:
        url: its last part is a form's name where ``name`` is empty.
        name: a key of :data:`FORMS`.
        body: of ``post``, the request.
        value: where the reply holds the score; empty takes the form's own place.

    Raises:
        InputError: there is no such form, or ``post`` lacks its body or its value.
    """
    last = urlsplit(url).path.rstrip("/").rsplit("/", 1)[-1]
    name = name or ("post" if body is not None else last)
    if name not in FORMS:
        raise InputError(f"form: {name!r} is unknown{did_you_mean(name, FORMS)}; any other address takes form post")
    form = FORMS[name]
    if name != "post":
        if body is not None:
            raise InputError(f"body: form {name!r} has its own; use form post, or extra_body for more fields")
        if form.states and value:
            raise InputError(f"value: form {name!r} has states for its head, and no score to point at")
        return replace(form, value=value or form.value)
    if not isinstance(body, Mapping) or not body or not value:
        raise InputError("form post needs body, such as {text: '{text}'}, and value, such as reward or data.0.score")
    if not _holes(body) & {"messages", "response", "text"}:
        raise InputError("body: holds no answer; put {messages}, {text} or {response} where it belongs")
    return Form(name, None, dict(body), value)


def _holes(part: Any) -> set[str]:
    if isinstance(part, str):
        return set(_HOLE.findall(part))
    inner = part.values() if isinstance(part, Mapping) else part if isinstance(part, list | tuple) else ()
    return {hole for entry in inner for hole in _holes(entry)}


def filled(part: Any, fields: Mapping[str, Any]) -> Any:
    """A body with its holes filled.

    A string that is nothing but ``{messages}`` becomes the list of messages; elsewhere texts are put into the string,
    all at once, so that braces in a text stay as they are.

    Args:
        part: a body, or a part of one.
        fields: by name of :data:`FIELDS`, those that there are.

    Raises:
        InputError: a list of messages stands inside a text.
    """
    if isinstance(part, str):
        if (whole := _HOLE.fullmatch(part)) is not None:
            return fields[whole[1]]
        return _HOLE.sub(lambda hole: _text(fields[hole[1]], hole[1]), part)
    if isinstance(part, Mapping):
        return {key: filled(entry, fields) for key, entry in part.items()}
    return [filled(entry, fields) for entry in part] if isinstance(part, list | tuple) else part


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"body: {{{name}}} is a list and must stand alone in its string")
    return value


def value_at(reply: Any, path: str) -> tuple[Any, bool]:
    """What stands at a path such as ``data.0.score``, and whether anything does."""
    for step in path.split("."):
        if isinstance(reply, dict) and step in reply:
            reply = reply[step]
        elif isinstance(reply, list) and step.isdigit() and int(step) < len(reply):
            reply = reply[int(step)]
        else:
            return None, False
    return reply, True


def numbers(found: Any) -> Any:
    """Finite floats in the shape that came; None where it is something else."""
    if isinstance(found, list):
        inner = [numbers(entry) for entry in found]
        return inner if inner and None not in inner else None
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    try:
        number = float(found)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None

"""What a server's replies hold, what they cost, and signs that it ignores what it was asked. No network here."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rankalign.engines import SamplingParams
from rankalign.engines.likeliest import merged
from rankalign.engines.openai_client import Again, Body, Failed

PROBE_TOKENS = 16
ALIKE_AFTER = 4
"""From so many prompts on, each with answers that are all the same, the server is said to draw nothing."""
# How a filter is set so that only the likeliest token passes, whatever the seed.
_GREEDY_FILTER = {"top_k": 1, "min_p": 1.0}


@dataclass(frozen=True)
class Answer:
    """One reply, read.

    Attributes:
        text: the answer; of a refusal, its words.
        finish: ``finish_reason``, or None where the server gives none.
        refused: the reply has its words under ``refusal``.
        model: the name under which the server answered, or empty.
        prompt_tokens: as reported; None where they are not.
        completion_tokens: as reported; None where they are not.
        choices: how many answers came.
        reasoning: what a reasoning model thought first, where the server sends it apart.
        calls: calls of the tools that were offered, as they came.
        logprobs: where they were asked for and came, ``{"token": text, "top": {text: log-probability}}`` by token.
    """

    text: str
    finish: str | None
    refused: bool
    model: str
    prompt_tokens: int | None
    completion_tokens: int | None
    choices: int
    reasoning: str
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)


def read_answer(reply: Body, tools: bool = False) -> Answer:
    """The answer in a reply of ``/chat/completions`` or ``/completions``.

    Args:
        reply: the body.
        tools: whether tools were offered, so that an answer may be nothing but calls of them.

    Raises:
        Again: there is none, and another try may bring one.
        Failed: the reply is whole and holds no text.
    """
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Again(f"the reply is an error: {reply['error']}" if reply.get("error") else "the reply has no choices")
    choice = choices[0]
    finish = choice.get("finish_reason")
    if finish in ("error", "abort", "cancelled"):
        raise Again(f"the reply broke off: finish_reason {finish}")
    calls = _calls(choice.get("message")) if tools else []
    text, refused = ("", False) if calls and not choice["message"].get("content") else _text(choice)
    prompt_tokens, completion_tokens = _counts(reply.get("usage"))
    return Answer(
        text=text,
        finish=finish if isinstance(finish, str) else None,
        refused=refused,
        model=str(reply.get("model") or ""),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        choices=len(choices),
        reasoning=_reasoning(choice.get("message")),
        calls=calls,
        logprobs=_logprobs(choice.get("logprobs")),
    )


def _logprobs(told: Any) -> list[dict[str, Any]]:
    """Log-probabilities by token, of either interface; nothing where they are not whole."""
    told = told if isinstance(told, dict) else {}
    try:
        if isinstance(told.get("content"), list):
            return [
                {
                    "token": _plain(entry["token"]),
                    "top": _top((o["token"], o["logprob"]) for o in entry["top_logprobs"]),
                }
                for entry in told["content"]
            ]
        tops = told.get("top_logprobs") or []
        pairs = zip(told.get("tokens") or [], tops, strict=True)
        return [{"token": _plain(token), "top": _top((top or {}).items())} for token, top in pairs]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def _top(pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
    return merged((_plain(token), float(value)) for token, value in pairs)


def _plain(token: Any) -> str:
    """A token's text; half a surrogate pair, which no file takes, becomes a mark."""
    return str(token).encode("utf-8", "replace").decode("utf-8")


def _calls(message: Any) -> list[dict[str, Any]]:
    """The calls of tools in a message, each with the name of a function."""
    found = message.get("tool_calls") if isinstance(message, dict) else None
    calls = [call for call in found if isinstance(call, dict)] if isinstance(found, list) else []
    return [call for call in calls if isinstance(call.get("function"), dict) and call["function"].get("name")]


def _counts(usage: Any) -> list[int | None]:
    told = usage if isinstance(usage, dict) else {}
    counts = [told.get(key) for key in ("prompt_tokens", "completion_tokens")]
    return [count if isinstance(count, int) and count >= 0 else None for count in counts]


def _reasoning(message: Any) -> str:
    told = message if isinstance(message, dict) else {}
    found = told.get("reasoning_content") or told.get("reasoning")
    parts = told.get("content")
    if not found and isinstance(parts, list):
        found = _joined(parts, "thinking", "reasoning")
    return _writable(found) if isinstance(found, str) else ""


def _text(choice: Body) -> tuple[str, bool]:
    message = choice.get("message")
    found = message.get("content") if isinstance(message, dict) else choice.get("text")
    refusal = message.get("refusal") if isinstance(message, dict) else None
    if isinstance(found, list):
        refusal = refusal or _joined(found, "refusal")
        found = _joined(found, "text", "output_text")
    if not found and isinstance(refusal, str) and refusal:
        return _writable(refusal), True
    if not found and choice.get("finish_reason") in ("length", "content_filter"):
        return "", False  # all of it was reasoning, or withheld
    # Some servers write an empty text for none. An answer that only thought or called is no empty answer.
    elsewhere = isinstance(message, dict) and (message.get("tool_calls") or _reasoning(message))
    if not isinstance(found, str) or (not found and elsewhere):
        raise Failed(f"the reply has no text: {_instead(choice, message)}")
    return _writable(found), False


def _joined(parts: Sequence[Any], *kinds: str) -> str | None:
    """The texts of the parts of some kinds, one behind the other; None where there is no such part."""
    found = [part for part in parts if isinstance(part, dict) and part.get("type") in kinds]
    texts = [next((part[key] for key in ("text", *kinds) if part.get(key)), "") for part in found]
    inner = [_joined(text, "text") or "" if isinstance(text, list) else str(text) for text in texts]
    return "".join(inner) if found else None


def _instead(choice: Body, message: Any) -> str:
    """What a reply without text does hold, in words."""
    told = message if isinstance(message, dict) else {}
    calls = [call for call in told.get("tool_calls") or () if isinstance(call, dict)]
    names = [str((call.get("function") or {}).get("name", "?")) for call in calls]
    content = told.get("content", choice.get("text"))
    found = {
        f"it calls {', '.join(names)}": bool(names),
        f"{len(_reasoning(message))} characters of reasoning": bool(_reasoning(message)),
        f"its content is a {type(content).__name__}": not isinstance(content, str | None),
    }
    what = [sentence for sentence, true in found.items() if true]
    return ", ".join([*what, f"finish_reason {choice.get('finish_reason')}"])[:200]


def _writable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Again("the reply's text holds half of a surrogate pair") from None
    return text


# --- what it costs -----------------------------------------------------------------------------------------------


@dataclass
class Usage:
    """Tokens and money of one policy in this process.

    Attributes:
        prompt_price: of a million prompt tokens.
        completion_price: of a million completion tokens.
        requests: answered ones, probes included.
        prompt_tokens: as the server reports them.
        completion_tokens: as the server reports them.
        unreported: answers whose tokens the server did not report.
    """

    prompt_price: float = 0.0
    completion_price: float = 0.0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unreported: int = 0

    @property
    def cost(self) -> float:
        """In the currency of the prices, discounts for cached tokens left aside."""
        return (self.prompt_tokens * self.prompt_price + self.completion_tokens * self.completion_price) / 1e6

    def add(self, answer: Answer) -> None:
        """Count one answer."""
        self.requests += 1
        self.prompt_tokens += answer.prompt_tokens or 0
        self.completion_tokens += answer.completion_tokens or 0
        self.unreported += answer.prompt_tokens is None or answer.completion_tokens is None

    def line(self, retries: int) -> str:
        """One line for the user."""
        told = f"{self.requests} requests, {retries} retries, "
        told += f"{self.prompt_tokens:,} prompt + {self.completion_tokens:,} completion tokens"
        told += f" ({self.unreported} answers without a count)" if self.unreported else ""
        return told + (f", cost {self.cost:.4f}" if self.prompt_price or self.completion_price else "")


# --- what the server ignores -------------------------------------------------------------------------------------


class Notes:
    """Sentences about a server, each said once on stderr and counted.

    Args:
        who: stands before each sentence.

    Attributes:
        counts: how often there was cause for each.
    """

    def __init__(self, who: str) -> None:
        self.who = who
        self.counts: Counter[str] = Counter()

    def add(self, text: str) -> None:
        """Say ``text`` if it was not said before."""
        self.counts[text] += 1
        if self.counts[text] == 1:
            print(f"{self.who}: {text}", file=sys.stderr, flush=True)


def shortfalls(answer: Answer, params: SamplingParams, model: str, cut: bool) -> list[str]:
    """What one reply shows the server to have left undone, in sentences that are the same for every prompt.

    Args:
        answer: the reply.
        params: what was asked.
        model: the model asked for.
        cut: a stop string stood in the text.
    """
    tokens = answer.completion_tokens
    named = answer.model if answer.finish != "content_filter" else model
    found = {
        "the server sends text behind stop strings, which is cut here": cut,
        f"the server does not keep to max_tokens {params.max_new_tokens}": (tokens or 0) > params.max_new_tokens,
        "the server reports no token usage for some answers": tokens is None or answer.prompt_tokens is None,
        "the server does not say why answers end; those at the token limit count as unfinished": answer.finish is None,
        "the server sends several answers where one was asked for; the first is taken": answer.choices > 1,
        # Servers add paths and versions to it.
        f"the server answers as {named!r}, asked for {model!r}": bool(named) and model not in named,
    }
    return [sentence for sentence, true in found.items() if true]


def probes(body: Body, params: SamplingParams) -> list[tuple[str, Body, Body]]:
    """Pairs of short requests that a server must answer alike, each with the sentence that holds if it does not.

    One pair repeats a request under its seed. For each filter that is not part of OpenAI's own interface, one pair
    sets it so that only the likeliest token is left and changes the seed. Greedy decoding needs none.
    """
    if params.temperature == 0:
        return []
    short = {**body, "max_tokens": min(PROBE_TOKENS, params.max_new_tokens)}
    found = [("the server does not repeat an answer under the same seed: another run gives others", short, short)]
    for name, greedy in _GREEDY_FILTER.items():
        if name in body:
            one, other = ({**short, name: greedy, "seed": seed} for seed in (1, 2))
            found.append((f"the server seems to ignore `{name}`", one, other))
    return found


@dataclass
class Variety:
    """Watches whether a server draws at all: it may ignore ``temperature``, or give every answer the same seed."""

    prompts: int = 0
    alike: int = 0

    def add(self, texts: Sequence[str]) -> None:
        """Note the answers that one prompt got under different seeds."""
        self.prompts += len(texts) > 1
        self.alike += len(texts) > 1 and len(set(texts)) == 1

    @property
    def none(self) -> bool:
        """Whether every prompt, of enough, got the same answer each time."""
        return self.prompts == self.alike >= ALIKE_AFTER


def finished(answer: Answer, params: SamplingParams) -> bool:
    """Whether an answer came to its own end."""
    if answer.finish is None:
        return (answer.completion_tokens or 0) < params.max_new_tokens
    return answer.finish not in ("length", "content_filter")


def marks(answer: Answer) -> dict[str, Any]:
    """What ``meta`` says of an answer that is not an ordinary one."""
    found: dict[str, Any] = {"refusal": True} if answer.refused else {}
    if answer.reasoning:
        found["reasoning"] = answer.reasoning
    if answer.logprobs:
        found["logprobs"] = answer.logprobs
    if answer.finish not in ("stop", "length", "eos", None):
        found["finish_reason"] = answer.finish
    return found

"""Answers by any OpenAI-compatible server: OpenAI's own, vllm serve, transformers serve, llama.cpp and many more."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import weakref
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from rankalign.data import templates
from rankalign.data.encode import NOTES
from rankalign.data.messages import SHOWN_COLUMNS, decoded, is_begun, said
from rankalign.data.records import CandidateSet, Response, refusal
from rankalign.engines import Policy, SamplingParams
from rankalign.engines.openai_checks import (
    Answer,
    Notes,
    Usage,
    Variety,
    finished,
    marks,
    probes,
    read_answer,
    shortfalls,
)
from rankalign.engines.openai_client import Body, Client, Failed
from rankalign.engines.seeds import request_seed
from rankalign.errors import InputError
from rankalign.storage.journal import Calls, content_digest

REQUESTS_A_SLOT = 4
"""A batch holds so many requests for each that may be in flight: few enough that a kill loses little, enough that the
slots seldom wait for a batch's last answers."""
# An answer that the prompt has begun goes on: names of vllm and SGLang; a server that knows none of them answers anew.
_GO_ON = {"continue_final_message": True, "add_generation_prompt": False}
_OURS = ("model", "messages", "prompt", "n", "stream", "seed", "stop", "max_tokens")


class OpenAIEngine:
    """Asks a server, one request an answer.

    Each of the ``n`` answers to a prompt is a request of its own with its own seed, a pure function of base seed,
    prompt id, policy name and index. So an answer does not depend on how many are asked for or on what else is asked,
    and servers that ignore ``n`` do no harm. At temperature 0 one request serves for all ``n``.

    Template ``auto`` or ``chat`` sends messages, and the server renders them; under every other one (and with ``auto``
    a string prompt that is rendered already) the text is rendered here and goes to ``/completions``.

    Args:
        policy: server, model, template and sampling settings; see ``docs/engines.md``.

    Attributes:
        calls: where each answer is kept as soon as it comes, and looked for before it is asked for.
        failed: by prompt id, the failures of the last batch, each ``{"index", "reason", "tries"}``; empty unless
            ``calls`` says that failures are skipped.
        usage: requests, tokens and cost so far.
        notes: what the server was found to ignore.
        close: shows usage on stderr and drops the connections; happens by itself when the engine goes.

    Raises:
        InputError: settings that no server can follow, or a key's variable that is not set.
    """

    def __init__(self, policy: Policy) -> None:
        _check(policy)
        self.policy = policy
        self.usage = Usage(policy.prompt_price, policy.completion_price)
        self.notes = Notes(f"policy {policy.name!r}")
        self._stop = tuple(dict.fromkeys((*policy.sampling.stop, *templates.stops(policy.template))))
        self._variety = Variety()
        self._probed = False
        self.calls = Calls(name=policy.name)
        self.failed: dict[str, list[dict[str, Any]]] = {}
        try:
            self._client = Client(policy.base_url, policy.api_key_env, policy.concurrency, self.notes.add)
        except InputError as error:
            raise InputError(f"policy {policy.name!r}: {error}") from None
        if self._client.holds_key(json.dumps(dataclasses.asdict(policy), ensure_ascii=False)):
            raise InputError(f"policy {policy.name!r}: the key in ${policy.api_key_env} stands in its settings too")
        # Whatever it is called with must not hold the engine, which would then never go.
        self.close = weakref.finalize(self, _close, self._client, self.usage, policy.name)

    def batches(self, prompts: Sequence[CandidateSet]) -> list[list[int]]:
        """Indices in the order of the prompts, :data:`REQUESTS_A_SLOT` requests for each slot."""
        size = max(1, REQUESTS_A_SLOT * self.policy.concurrency // self._copies)
        if rendered := sum(map(self._is_rendered, prompts)):
            self.notes.add(f"{rendered} {NOTES['already_rendered']}")
        return [list(range(i, min(i + size, len(prompts)))) for i in range(0, len(prompts), size)]

    def remember(self, calls: Calls) -> None:
        """Keep answers in ``calls``, and do as it says with those that fail."""
        self.calls, self._client.skip = calls, calls.skip
        self._probed = self._probed or calls.probed

    def generate(self, prompts: Sequence[CandidateSet]) -> list[list[Response]]:
        """Answer one batch; where failures are skipped, answers that failed are missing.

        Raises:
            InputError: the server refused a request or failed too often; what was answered is kept in ``calls``.
        """
        jobs = [self._answer(prompt, index) for prompt in prompts for index in range(self._copies)]
        checks = [] if self._probed or not prompts else [self._probe(*p) for p in self._probes(prompts[0])]
        try:
            found = self._client.gather([*jobs, *checks])
        except Failed as error:
            advice = "; --on_error skip leaves such prompts out and counts them" if self.calls else ""
            raise InputError(f"policy {self.policy.name!r}: {error}; {self._safe()}{advice}") from None
        except InputError as error:
            raise InputError(f"policy {self.policy.name!r}: {error}; {self._safe()}") from None
        self._probed = True
        rows = [found[i : i + self._copies] for i in range(0, len(jobs), self._copies)]
        self.failed = {
            prompt.id: failures
            for prompt, row in zip(prompts, rows, strict=True)
            if (failures := [answer for answer in row if isinstance(answer, dict)])
        }
        answers = [[answer for answer in row if isinstance(answer, Response)] for row in rows]
        self._look_for_variety(answers)
        return [[*row, *self._copied(row)] for row in answers]

    @property
    def _copies(self) -> int:
        return 1 if self.policy.sampling.temperature == 0 else self.policy.sampling.n

    def _copied(self, row: Sequence[Response]) -> list[Response]:
        """At temperature 0, the one answer again for each of the others."""
        wanted = range(len(row), self.policy.sampling.n) if row and self._copies == 1 else ()
        return [self._copy(row[0], index) for index in wanted]

    def _safe(self) -> str:
        return f"{len(self.calls)} answers are safe in the journal, and the same command goes on behind them"

    # --- one answer ----------------------------------------------------------------------------------------------

    async def _answer(self, prompt: CandidateSet, index: int) -> Response | dict[str, Any]:
        body = self._body(prompt, request_seed(self.policy.sampling.seed, prompt.id, self.policy.name, index))
        try:
            answer, seeded = await self._ask(prompt.id, index, body)
        except Failed as error:
            if self.calls.skip:
                return {"index": index, "reason": str(error), "tries": error.tries}
            raise Failed(f"prompt {prompt.id!r}: {error}", error.tries) from None
        except InputError as error:
            raise InputError(f"prompt {prompt.id!r}: {error}") from None
        return self._response(answer, index, body["seed"] if seeded else None)

    async def _ask(self, prompt: str, index: int, body: Body) -> tuple[Answer, bool]:
        """The answer to a request, kept or fetched, and whether the server took its seed."""
        digest = content_digest([self.policy.base_url, index, body])  # the index tells the two halves of a probe apart
        if kept := self.calls.find(prompt, digest):
            return Answer(**kept["answer"]), kept["seeded"]
        if failure := self.calls.failure(prompt, digest):
            raise Failed(failure["reason"], failure["tries"])
        try:
            answer = await self._client.ask(
                "messages" in body, body, functools.partial(read_answer, tools="tools" in body)
            )
        except Failed as error:
            self.calls.fail(prompt, digest, str(error), error.tries)
            raise
        self.usage.add(answer)
        seeded = "seed" not in self._client.refused
        self.calls.keep([(prompt, digest, {"answer": dataclasses.asdict(answer), "seeded": seeded})])
        return answer, seeded

    def _body(self, prompt: CandidateSet, seed: int) -> Body:
        """The request. ``top_p`` goes even where it is 1: some servers put a model's own default in its place."""
        params = self.policy.sampling
        body: Body = {"model": self.policy.model, **self._asked(prompt)}
        body |= {"temperature": params.temperature, "top_p": params.top_p, "max_tokens": params.max_new_tokens}
        more = {"stop": list(self._stop), "top_k": params.top_k, "min_p": params.min_p}
        body |= {"seed": seed} | {key: value for key, value in more.items() if value}
        if params.logprobs:
            body |= (
                {"logprobs": True, "top_logprobs": params.logprobs}
                if "messages" in body
                else {"logprobs": params.logprobs}
            )
        return body | self.policy.extra_body

    def _is_rendered(self, prompt: CandidateSet) -> bool:
        """Whether a string prompt ends where an answer begins, so that no template goes around it."""
        text, policy = prompt.prompt, self.policy
        return policy.template != "chat" and not policy.system and isinstance(text, str) and templates.is_rendered(text)

    def _asked(self, prompt: CandidateSet) -> Body:
        template, system, text = self.policy.template, self.policy.system, prompt.prompt
        if self._is_rendered(prompt):
            return {"prompt": text}
        if template in ("auto", "chat"):
            messages = templates.as_messages(text, system)
            told = {key: decoded(prompt.meta[key]) for key in said(prompt.meta, SHOWN_COLUMNS)}
            return {"messages": messages, **told, **(_GO_ON if is_begun(messages) else {})}
        if fields := said(prompt.meta, ("tools", "documents")):
            raise refusal(prompt, f"meta.{fields[0]}", f"template {template!r} has no place for it; use chat")
        return {"prompt": templates.render(text, template, system, prompt.meta)}

    def _response(self, answer: Answer, index: int, seed: int | None) -> Response:
        params = self.policy.sampling
        text, cut = templates.cut_at_stop(answer.text, self._stop)
        for sentence in shortfalls(answer, params, self.policy.model, cut):
            self.notes.add(sentence)
        sampling = _provenance(params, index)
        if seed is not None:
            sampling["request_seed"] = seed
        if answer.model.split("@")[0] not in ("", self.policy.model):  # what follows is a revision
            sampling["model"] = answer.model
        counts = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        sampling["usage"] = {key: count for key, count in counts.items() if count is not None}
        response = Response(
            text, self.policy.name, cut or finished(answer, params), sampling=sampling, meta=marks(answer)
        )
        if answer.calls:
            thought = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
            message = {"role": "assistant", "content": text or None, **thought, "tool_calls": answer.calls}
            response.messages = [message]
        return response

    def _copy(self, response: Response, index: int) -> Response:
        return dataclasses.replace(response, sampling={**response.sampling, "index": index, "usage": {}})

    # --- what the server ignores ---------------------------------------------------------------------------------

    def _probes(self, prompt: CandidateSet) -> list[tuple[str, Body, Body]]:
        params = self.policy.sampling
        return probes(self._body(prompt, request_seed(params.seed, prompt.id, self.policy.name, 0)), params)

    async def _probe(self, sentence: str, one: Body, other: Body) -> None:
        try:
            answers = [await self._ask("", place, body) for place, body in enumerate((one, other))]
        except Failed:  # what it was to show stays unknown
            return
        (first, seeded), (second, _) = answers
        # Where the seed was refused it is no news that an answer does not repeat.
        if first.text != second.text and ("seed" in sentence) <= seeded:
            self.notes.add(sentence)

    def _look_for_variety(self, rows: Sequence[Sequence[Response]]) -> None:
        for row in rows:
            self._variety.add([response.text for response in row])
        if self._variety.none:
            self.notes.add("all answers to a prompt are the same: the server seems to ignore temperature or seed")


def _close(client: Client, usage: Usage, name: str) -> None:
    if usage.requests or client.retries:
        print(f"policy {name!r}: {usage.line(client.retries)}", file=sys.stderr)
    client.close()


def _check(policy: Policy) -> None:
    """Refuse settings that a server cannot follow, rather than leave them out in silence."""
    templates.check_name(policy.template)
    for problem, true in _problems(policy).items():
        if true:
            raise InputError(f"policy {policy.name!r}: {problem}")


def _problems(policy: Policy) -> dict[str, bool]:
    url = urlsplit(policy.base_url)
    secret = "@" in url.netloc or bool(url.query)
    ours = [key for key in policy.extra_body if key in _OURS]
    return {
        "engine 'openai' needs base_url, such as http://127.0.0.1:8000/v1": not policy.base_url,
        "base_url must begin with http:// or https://": url.scheme not in ("http", "https") or not url.hostname,
        "base_url must hold no user, password or query; api_key_env names a variable with the key": secret,
        "a server does not take adapter; serve it, and name it as the model": bool(policy.adapter),
        "a server does not take dtype; it is chosen where the server is started": policy.dtype != "auto",
        "a server searches no beams; use engine hf": policy.sampling.num_beams > 1,
        "concurrency must be at least 1": policy.concurrency < 1,
        f"extra_body must not hold {', '.join(ours)}: the engine sets that": bool(ours),
    }


def _provenance(params: SamplingParams, index: int) -> dict[str, Any]:
    """How an answer was asked for: temperature and base seed, and all that is not default."""
    told: dict[str, Any] = {"temperature": params.temperature, "seed": params.seed}
    if params.top_p != 1:
        told["top_p"] = params.top_p
    more = {"top_k": params.top_k, "min_p": params.min_p, "stop": list(params.stop)}
    told |= {key: value for key, value in more.items() if value}
    return {**told, "max_new_tokens": params.max_new_tokens, "index": index}

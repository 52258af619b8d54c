"""Scores by a reward model behind a server: vLLM's ``/classify``, ``/pooling`` and ``/score``, or any POST of JSON.

One request a text, so that whatever was answered is kept in the journal and never asked twice. With a ``head`` the
server has the trunk alone, and the head grades here what it sends of each text's states.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rankalign.data import templates
from rankalign.data.messages import decoded, no_thoughts, said, without_thought
from rankalign.data.records import CandidateSet, Message, Response, refusal
from rankalign.engines.openai_checks import Notes
from rankalign.engines.openai_client import Again, Body, Client, Failed
from rankalign.errors import InputError
from rankalign.registry import did_you_mean
from rankalign.scorers import Explanation
from rankalign.scorers.outputs import weighed_outputs
from rankalign.scorers.server_forms import filled, form_of, numbers, value_at
from rankalign.storage.journal import Calls, content_digest

if TYPE_CHECKING:
    from rankalign.scorers.served_states import ServedHead

TOKENS = ("last", "mean", "min", "sum")
SQUASHED_AFTER = 20
"""So many scores, all from 0 to 1, look like what a sigmoid left of rewards."""


class RewardServerScorer:
    """Posts each conversation, prompt and answer, and takes a number from the reply.

    Failures are handled as the engine ``openai`` handles them: retries with growing waits, the server's own wishes to
    wait, one gate for all requests; what it refuses for good ends the run or, with ``--on_error skip``, leaves that
    answer without a score, counted and listed.

    Args:
        name: key of the scores.
        url: the whole address to post to, such as ``http://127.0.0.1:8000/classify``.
        form: one of :data:`rankalign.scorers.server_forms.FORMS`; empty takes it from the end of ``url``, ``post``
            where ``body`` is given, and ``token_embed`` where ``head`` is.
        model: what the server calls the model; empty sends none.
        template: ``auto`` and ``chat`` send messages, which the server renders; every other one renders here and sends
            a text. Form ``score`` sends texts of prompt and answer, whatever it is (``auto`` then means ``raw``).
        system: system message put before each prompt that has none.
        body: of form ``post``, the request: see :func:`rankalign.scorers.server_forms.filled`.
        value: where the score stands in the reply, as keys and indices with dots between, ``data.0.score``.
        axis: of several numbers in its place, the index of the one that grades, or ``mean``; or several with weights,
            ``0:0.65,1:0.8``, which are added up. A head's outputs have names too.
        tokens: of a list with an entry a token, which grades: ``last``, ``mean``, ``min`` or ``sum``. The list is kept
            with the response as ``token_scores``.
        api_key_env: environment variable that holds the key.
        concurrency: most requests in flight.
        extra_body: more fields of every request; they win over the form's own.
        thoughts: ``drop`` sends answers without what the model thought, ``keep`` with it.
        head: folder of a reward model whose head grades here, on hidden states of a server that has its trunk: the
            model's own, or one with its config, tokenizer and the head's tensors. Texts are rendered and encoded here.
        pooling: of a head, as in :class:`rankalign.scorers.reward_model.RewardModelScorer`.

    Raises:
        InputError: an option is wrong; the message names it.
    """

    def __init__(
        self,
        name: str,
        url: str,
        form: str = "",
        model: str = "",
        template: str = "auto",
        system: str = "",
        body: Mapping[str, Any] | None = None,
        value: str = "",
        axis: str | int = "",
        tokens: str = "",
        api_key_env: str = "",
        concurrency: int = 8,
        extra_body: Mapping[str, Any] | None = None,
        thoughts: str = "drop",
        head: str = "",
        pooling: str = "",
    ) -> None:
        self.name, self.url, self.model = name, url, model
        self.template, self.system, self.thoughts = template, system, thoughts
        self.axis, self.tokens = str(axis), tokens
        self.extra_body = dict(extra_body or {})
        self._calls, self._told = Calls(name=name), list[Explanation]()
        self._low, self._high, self._seen = math.inf, -math.inf, 0
        self._notes = Notes(f"scorer {name!r}")
        try:
            self.form = form_of(url, form or ("token_embed" if head else ""), body, value)
            self._check(concurrency, head, pooling)
            self._head = self._head_of(head, pooling) if head else None
            where = urlsplit(url)
            self._client = Client(
                f"{where.scheme}://{where.netloc}", api_key_env, concurrency, self._notes.add, setting="url"
            )
            if self._client.holds_key(json.dumps(self.fingerprint(), ensure_ascii=False)):
                raise InputError(f"the key in ${api_key_env} stands in its settings too")
        except InputError as error:
            raise InputError(f"scorer {name!r}: {error}") from None
        # What it is called with must not hold the scorer, which would then never go.
        self.close = weakref.finalize(self, _close, self._client, name)

    def _check(self, concurrency: int, head: str, pooling: str) -> None:
        if bool(head) != self.form.states:
            forms = f"form {self.form.name!r} reads rewards; a head takes token_embed or embed"
            raise InputError(f"head: {forms}" if head else f"form {self.form.name!r} needs head, a folder")
        if pooling and not head:
            raise InputError("pooling: is a head's; what a server pools it does not say")
        if head and self.tokens:
            raise InputError("tokens: a head makes one score of a text")
        url = urlsplit(self.url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise InputError("url must begin with http:// or https://")
        if "@" in url.netloc or url.query:
            raise InputError("url must hold no user, password or query; api_key_env names a variable with the key")
        templates.check_name(self.template)
        for option, known in (("thoughts", ("drop", "keep")), ("tokens", ("", *TOKENS))):
            if (given := getattr(self, option)) not in known:
                raise InputError(f"{option}: {given!r} is unknown{did_you_mean(given, known)}")
        indices = [part.partition(":")[0].strip() for part in self.axis.split(",")]
        if not head and self.axis not in ("", "mean") and not all(map(str.isdigit, indices)):
            raise InputError(f"axis: expected an index or mean, found {self.axis!r}; servers do not name outputs")
        if concurrency < 1:
            raise InputError("concurrency must be at least 1")

    def _head_of(self, folder: str, pooling: str) -> ServedHead:
        from rankalign.scorers.served_states import ServedHead

        head = ServedHead(folder, self.form, self.template, self.system, self.thoughts, pooling, bool(self.axis))
        self._choose([0.0] * len(head.names), head.names)  # says what does not fit before anything is asked
        return head

    def fingerprint(self) -> dict[str, Any]:
        """Address and all that shapes request and score; what weights the server holds it does not say."""
        told = {
            "kind": "reward_server",
            "url": self.url,
            "form": self.form.name,
            "model": self.model,
            "template": self.template,
            "system": self.system,
            "body": self.form.body,
            "value": self.form.value,
            "axis": self.axis,
            "tokens": self.tokens,
            "extra_body": self.extra_body,
            "thoughts": self.thoughts,
            "head": self._head.identity if self._head else None,
        }
        return {key: value for key, value in told.items() if value not in ("", {}, None)}

    def remember(self, calls: Calls) -> None:
        """Keep each reply's numbers in ``calls``, and look there before asking."""
        self._calls, self._client.skip = calls, calls.skip

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """One score a response; None where its request failed and failures are skipped.

        Raises:
            InputError: the server refused a request or failed too often; what it answered is kept.
        """
        bodies = [[self._body(record, response) for response in record.responses] for record in sets]
        # Answers of one prompt that read the same are asked about once.
        jobs: dict[tuple[str, str], Coroutine[Any, Any, Any]] = {}
        keys = [[(record.id, self._digest(body)) for body in row] for record, row in zip(sets, bodies, strict=True)]
        for row, texts in zip(keys, bodies, strict=True):
            for key, body in zip(row, texts, strict=True):
                if key not in jobs:
                    jobs[key] = self._ask(*key, body)
        try:
            found = dict(zip(jobs, self._client.gather(list(jobs.values())), strict=True))
        except InputError as error:
            safe = f"{len(self._calls)} scores are safe in the journal, and the same command goes on behind them"
            skips = self._calls and isinstance(error, Failed)
            advice = "; --on_error skip leaves such answers without a score" if skips else ""
            raise InputError(f"scorer {self.name!r}: {error}; {safe}{advice}") from None
        for sentence in self._head.said() if self._head else ():
            self._notes.add(sentence)
        rows = [[found[key] for key in row] for row in keys]
        self._told = [self._explanation(row) for row in rows]
        scores = [[None if isinstance(f, dict) else self._reduced(f) for f in row] for row in rows]
        self._look_for_sigmoids(scores)
        return scores

    def explain(self) -> list[Explanation]:
        """For each record of the last batch its failed requests, and the scores of tokens."""
        return self._told

    def _explanation(self, row: Sequence[Any]) -> Explanation:
        failed = any(isinstance(found, dict) for found in row)
        calls = [{"failed": found} if isinstance(found, dict) else {} for found in row]
        kept = [{"token_scores": f} if self.tokens and not isinstance(f, dict) else {} for f in row]
        return Explanation({"calls": calls} if failed else {}, kept)

    async def _ask(self, record: str, digest: str, body: Body) -> Any:
        """The numbers in the reply, kept or fetched; why there are none where failures are skipped."""
        if (kept := self._calls.find(record, digest)) is not None:
            return kept
        try:
            numbers = await self._fetch(record, digest, body)
        except Failed as error:
            if self._calls.skip:
                return {"reason": str(error), "tries": error.tries}
            raise Failed(f"record {record!r}: {error}", error.tries) from None
        except InputError as error:
            raise InputError(f"record {record!r}: {error}") from None
        self._calls.keep([(record, digest, numbers)])
        return numbers

    async def _fetch(self, record: str, digest: str, body: Body) -> Any:
        if failure := self._calls.failure(record, digest):
            raise Failed(failure["reason"], failure["tries"])
        try:
            return await self._client.ask(self.url, body, functools.partial(self._read, body))
        except Failed as error:
            self._calls.fail(record, digest, str(error), error.tries)
            raise

    # --- request -----------------------------------------------------------------------------------------------------

    def _digest(self, body: Body) -> str:
        return content_digest([self.url, body, self._head.identity] if self._head else [self.url, body])

    def _body(self, record: CandidateSet, response: Response) -> Body:
        if self._head:
            return ({"model": self.model} if self.model else {}) | self._head.body(record, response) | self.extra_body
        form, keep = self.form, self.thoughts == "keep"
        if lost := said(record.meta, ("tools", "documents")):
            raise refusal(record, f"meta.{lost[0]}", "a server of scores has no field for it; use kind reward_model")
        answer: list[Message] = response.messages or [{"role": "assistant", "content": response.text}]
        answer = answer if keep else no_thoughts(answer)
        chat = form.takes_messages and self.template in ("auto", "chat")
        fields: Body = {}
        if chat or form.holes & {"messages", "prompt_messages"}:
            asked = templates.as_messages(record.prompt, self.system)
            fields = {"messages": [*asked, *answer], "prompt_messages": asked}
        if not chat and form.holes & {"prompt", "response", "text"}:
            if len(answer) > 1 or said(answer[0], ("tool_calls",)):
                raise refusal(record, "responses", "a text has no place for calls of tools; send {messages}")
            text = response.text if keep else without_thought(response.text)
            prompt = self._prompt(record)
            fields |= {"prompt": prompt, "response": text, "text": prompt + text}
        body: Body = filled(form.body_of(chat), fields)
        if chat:
            kwargs = decoded(record.meta.get("chat_template_kwargs"))
            body |= {"chat_template_kwargs": kwargs} if kwargs else {}
            # A text that was cut ends where it ends, as in scores of a model in this process.
            body |= {} if response.finished else {"continue_final_message": True}
        return ({"model": self.model} if self.model else {}) | body | self.extra_body

    def _prompt(self, record: CandidateSet) -> str:
        name = "raw" if self.template in ("auto", "chat") else self.template
        return templates.render(record.prompt, name, self.system, record.meta)

    # --- reply -------------------------------------------------------------------------------------------------------

    def _read(self, body: Body, reply: Body) -> Any:
        if self._head:
            return self._head.outputs(body["input"], reply)
        found, there = value_at(reply, self.form.value)
        if not there and reply.get("error"):  # with status 200, as routers send it
            raise Again(f"the reply is an error: {reply['error']}")
        if not there:
            raise Failed(f"the reply has no {self.form.value}; it holds {', '.join(map(str, reply)) or 'nothing'}")
        known = numbers(found)
        if known is None:
            raise Failed(f"the reply's {self.form.value} is no finite number, nor a list of such")
        self._reduced(known)  # says here what does not fit, before it is kept
        return known

    def _reduced(self, found: Any) -> float:
        """The score in a number, a list with one an output or, with ``tokens``, a list with an entry a token."""
        if not self.tokens:
            return self._chosen(found)
        if not isinstance(found, list) or not found:
            raise InputError(f"tokens: the reply's {self.form.value} is no list with an entry a token")
        each = [self._chosen(entry) for entry in found]
        if self.tokens == "last":
            return each[-1]
        total = math.fsum(each)
        return {"mean": total / len(each), "min": min(each), "sum": total}[self.tokens]

    def _chosen(self, found: Any) -> float:
        values = found if isinstance(found, list) else [found]
        if any(isinstance(value, list) for value in values):
            raise InputError(f"the reply's {self.form.value} is a list with an entry a token; choose by `tokens`")
        return self._choose(values, self._head.names if self._head else list(map(str, range(len(values)))))

    def _choose(self, values: list[float], names: list[str]) -> float:
        if self.axis == "mean":
            return math.fsum(values) / len(values)
        if weights := weighed_outputs(self.axis, names):
            return math.fsum(weight * values[index] for index, weight in weights.items())
        if not self.axis and len(values) > 1:
            raise InputError(f"there are {len(values)} outputs; choose one by `axis`, an index or mean")
        if self.axis in names:
            return float(values[names.index(self.axis)])
        if not self.axis or (self.axis.isdigit() and int(self.axis) < len(values)):
            return float(values[int(self.axis or 0)])
        known = f"; they are {', '.join(names)}" if self.form.states else f", it has {len(values)}"
        raise InputError(f"axis: there is no output {self.axis}{known}")

    def _look_for_sigmoids(self, scores: Sequence[Sequence[float | None]]) -> None:
        known = [score for row in scores for score in row if score is not None]
        self._seen += len(known)
        self._low, self._high = min([self._low, *known]), max([self._high, *known])
        raw = self.form.name in ("classify", "pooling") and not self.extra_body.get("use_activation")
        if raw and self._seen >= SQUASHED_AFTER and self._low >= 0 and self._high <= 1:
            self._notes.add(
                "all scores lie from 0 to 1: the server seems to put a sigmoid or softmax over the rewards though "
                "asked for none (use_activation); older vLLM knows it as extra_body: {activation: false}"
            )


def _close(client: Client, name: str) -> None:
    if client.retries:
        print(f"scorer {name!r}: {client.retries} tries failed and were made again", file=sys.stderr)
    client.close()

"""A patient client of OpenAI-compatible servers: concurrency, retries, rate limits. Only this file imports openai."""

from __future__ import annotations

import asyncio
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import httpx
import openai

from rankalign.engines.openai_waits import wait_asked
from rankalign.errors import InputError
from rankalign.storage.jsonl import loads

T = TypeVar("T")
Body = dict[str, Any]

TRIES = 10
"""How often a request is sent before its prompt counts as failed."""
FIRST_DELAY_S = 0.5
"""Longest wait before the second try; it doubles with every further one."""
LONGEST_DELAY_S = 30.0
LONGEST_WAIT_S = 3600.0
"""A server that asks for a longer wait than this is not waited for."""
TOLD_WAIT_S = 10.0
"""Waits from this on are announced on stderr."""
TIMEOUT_S = 600.0
"""An answer that is not whole by then has failed."""
MAX_STOPS = 4
"""How many stop strings the strictest servers take."""

CONNECT_S = 5.0
"""A server that does not take the connection by then is not reached."""
UNREACHED_TRIES, UNREACHED_S = 4, 8.0
"""How often, and for how long, a server is called that never answered anything: a wrong address stays wrong."""
DRAIN_S = 120.0
"""How long the requests on their way may still take when another one has ended the run: they are paid for."""

_RETRIED = {408, 409, 425, 429}  # those of the official client, and 425 (too early)
_ABOUT_ONE = {400, 413, 422, 451}
"""Statuses of a refusal that is about the request; others are about the key, the model or the account."""
# Routers answer 403 to a prompt that a moderator flagged, too.
_MODERATED = re.compile(r"moderat|flagged|content policy|safety", re.I)
_NOT_TAKEN = re.compile(
    r"unsupported|not support|unexpected|unknown|unrecogni|permitted|not allowed|array too long|extra", re.I
)


class Again(Exception):
    """A try failed in a way that may pass: what happened, and how many seconds the server asks to wait (0: none)."""

    def __init__(self, reason: str, wait: float = 0.0, reached: bool = True) -> None:
        super().__init__(reason)
        self.wait, self.reached = wait, reached


class Failed(InputError):
    """This one request has failed for good; others may do better. ``tries`` says how often it was sent."""

    def __init__(self, reason: str, tries: int = 1) -> None:
        super().__init__(reason)
        self.tries = tries


class _Refused(Exception):
    """The server does not take one field of the body, and there is another way to say it, or no need to."""


class Client:
    """One server, asked by several requests at a time.

    It runs an event loop in a thread of its own, so that it can be called from programs with a loop (notebooks, Ray
    actors) and an interrupt ends requests at once.

    Args:
        base_url: up to and with ``/v1``; no user, password or query in it.
        api_key_env: environment variable that holds the key; empty sends none (and never ``OPENAI_API_KEY``).
        concurrency: most requests in flight.
        note: takes a sentence for the user, each time there is cause.
        setting: what the user calls the address, for messages.

    Attributes:
        skip: whether one request that fails for good leaves the others their chance.
        retries: failed tries so far.
        refused: fields that the server does not take and that are left out or said otherwise.

    Raises:
        InputError: the variable is not set.
    """

    def __init__(
        self,
        base_url: str,
        api_key_env: str,
        concurrency: int,
        note: Callable[[str], None],
        setting: str = "base_url",
    ) -> None:
        self._setting = setting
        self._key_env, self._key = api_key_env, _key(api_key_env)
        self._note = note
        self._slots = asyncio.Semaphore(concurrency)
        self._gate_opens = 0.0
        self._url, self._reached, self._ending = base_url, False, False
        self._sending: set[asyncio.Task[Any] | None] = set()
        self.skip = False
        self.retries = 0
        self.refused: list[str] = []
        # Headers that the library would take from the environment were not meant for this server.
        self._headers: dict[str, Any] = dict.fromkeys(("OpenAI-Organization", "OpenAI-Project"), openai.Omit())
        self._headers["Authorization"] = f"Bearer {self._key}" if self._key else openai.Omit()
        self._openai = openai.AsyncOpenAI(
            api_key=self._key or "none",  # the library does not start without one; the header decides
            base_url=base_url,
            max_retries=0,  # ours keep all requests back at one gate
            timeout=openai.Timeout(TIMEOUT_S, connect=min(CONNECT_S, TIMEOUT_S)),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_serve, args=(self._loop,), daemon=True)

    def holds_key(self, text: str) -> bool:
        """Whether the key stands in ``text``."""
        return bool(self._key) and self._key in text

    def gather(self, jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """Run jobs side by side and wait for all. The first failure ends the run: requests on their way may still come
        back, others are not sent. An interrupt ends all at once.

        Raises:
            InputError: what the first failed job raised.
        """
        if not self._thread.ident:
            self._thread.start()
        future = asyncio.run_coroutine_threadsafe(self._all(jobs), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _all(self, jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        if not jobs:
            return []
        self._ending = False
        tasks = [asyncio.ensure_future(job) for job in jobs]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            failures = [e for task in tasks if task.done() and not task.cancelled() and (e := task.exception())]
            if failures:
                self._ending = True  # first: whoever gets a slot from now on sees it
                going = [task for task in tasks if task in self._sending]
                for task in tasks:
                    if task not in going:
                        task.cancel()
                if going:
                    await asyncio.wait(going, timeout=DRAIN_S)
                raise failures[0]
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """Drop the connections and end the thread, without waiting: it may be this very thread that lets go last."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._shut(), self._loop)

    async def _shut(self) -> None:
        await self._openai.close()
        self._loop.stop()

    async def ask(self, chat: bool | str, body: Body, read: Callable[[Body], T]) -> T:
        """Send a request until there is an answer.

        Args:
            chat: ``/chat/completions`` if true, ``/completions`` if false, or the whole address to post to.
            body: the JSON to send.
            read: makes an answer of the reply; raises :class:`Again` for a reply that holds none.

        Raises:
            Failed: the server refused the request, its reply holds no answer, or all tries failed.
            InputError: no request can be answered: a wrong key, no such model, nobody there.
        """
        async with self._slots:
            if self._ending:  # it waited for this slot while another request ended the run
                raise asyncio.CancelledError
            try:
                return await self._insist(chat, body, read)
            except InputError as error:
                self._ending = not (self.skip and isinstance(error, Failed))
                raise

    async def _insist(self, chat: bool | str, body: Body, read: Callable[[Body], T]) -> T:
        tries, began = 0, time.monotonic()
        while True:
            sent = self._said_otherwise(body)
            await self._gate()
            try:
                return read(await self._counted(chat, sent))
            except _Refused as refusal:
                if sent == self._said_otherwise(body):  # else another request has learned it meanwhile
                    self._learn(str(refusal))
            except Failed as failure:
                failure.tries = tries + 1
                raise
            except Again as failure:
                tries, reason = tries + 1, self.clean(str(failure))
                if not failure.reached:
                    self._check_reached(tries, time.monotonic() - began, reason)
                if tries == TRIES or self._ending:
                    raise Failed(f"no answer in {tries} tries, the last one: {reason}", tries) from None
                self.retries += 1
                if not failure.wait:  # a wait that the server asks for is kept at the gate
                    await asyncio.sleep(_delay(tries))

    async def _counted(self, chat: bool | str, body: Body) -> Body:
        """Send, known as on its way."""
        task = asyncio.current_task()
        self._sending.add(task)
        try:
            return await self._send(chat, body)
        finally:
            self._sending.discard(task)

    def _check_reached(self, tries: int, seconds: float, reason: str) -> None:
        """Give up early on a server that nothing was ever heard of; one that was there may be starting again."""
        if not self._reached and (tries >= min(UNREACHED_TRIES, TRIES) or seconds > UNREACHED_S):
            advice = f"is the server running, and is {self._setting} right?"
            raise InputError(f"{self._url} cannot be reached in {tries} tries, the last one: {reason}; {advice}")

    # --- one try -------------------------------------------------------------------------------------------------

    async def _send(self, chat: bool | str, body: Body) -> Body:
        try:
            async with asyncio.timeout(TIMEOUT_S):  # the HTTP library's own timeout begins again with every byte
                reply = await self._post(chat, body)
        except (TimeoutError, openai.APITimeoutError) as error:
            if not _connected(error):
                raise Again(f"no connection within {CONNECT_S:g} s", reached=False) from None
            raise Again(f"no whole answer within {TIMEOUT_S:g} s") from None
        except openai.APIStatusError as error:
            return await self._status(error, body)
        except openai.APIConnectionError as error:
            reason = f"connection lost or refused ({_brief(error.__cause__ or error)})"
            raise Again(reason, reached=_connected(error)) from None
        self._reached = True
        self._hold(wait_asked(reply.headers, limited=False) or 0)  # this reply may have used up the limit
        return _json_object(reply.content)

    async def _post(self, chat: bool | str, body: Body) -> httpx.Response:
        if isinstance(chat, str):
            return await self._openai.post(chat, cast_to=httpx.Response, body=body, options={"headers": self._headers})
        api: Any = self._openai.chat.completions if chat else self._openai.completions
        named = {key: body[key] for key in ("model", "messages", "prompt") if key in body}
        rest = {key: value for key, value in body.items() if key not in named}
        raw = await api.with_raw_response.create(**named, extra_body=rest, extra_headers=self._headers)
        found: httpx.Response = raw.http_response
        return found

    async def _status(self, error: openai.APIStatusError, body: Body) -> Body:
        """What an error status means: another try, an answer withheld by a filter, or an end with a message."""
        status, code, said = error.status_code, getattr(error, "code", None), self.clean(_said(error))
        headers, self._reached = error.response.headers, True
        passing = (status in _RETRIED or status >= 500) and headers.get("x-should-retry") != "false"
        if passing and code != "insufficient_quota":  # a 429 that no wait mends
            wait = wait_asked(headers, limited=status == 429) or 0.0
            if wait > LONGEST_WAIT_S:
                raise InputError(f"the server asks for a wait of {wait:.0f} s: {status} {said}")
            self._hold(wait)
            raise Again(f"{status} {said}", wait)
        if code == "content_filter":
            return {"choices": [{"message": {"content": ""}, "text": "", "finish_reason": "content_filter"}]}
        if status in (400, 422) and (field := _field(error, said, body)):
            raise _Refused(field)
        if status in _ABOUT_ONE or (status == 403 and _MODERATED.search(said)):
            raise Failed(f"the server refuses: {status} {said}")
        raise InputError(f"the server refuses: {status} {said}{await self._advice(status)}")

    async def _advice(self, status: int) -> str:
        if status in (401, 403):
            unnamed = "; name the environment variable that holds the key with api_key_env"
            return f"; is the key in ${self._key_env} the right one?" if self._key_env else unnamed
        if status != 404:
            return ""
        if self._setting != "base_url":  # no part of an API that has a list of models
            return f"; check {self._setting} and model"
        try:
            names = [
                model.id for model in (await self._openai.models.list(timeout=10, extra_headers=self._headers)).data
            ]
        except (openai.OpenAIError, TypeError, AttributeError):  # some servers have no list, or one of another form
            return "; check base_url (it ends in /v1) and model"
        return self.clean(f"; its models: {', '.join(names[:8])}")

    # --- between tries -------------------------------------------------------------------------------------------

    def _hold(self, seconds: float) -> None:
        """Let no request out for so long: a limit that one of them met is met by all."""
        opens = time.monotonic() + min(seconds, LONGEST_WAIT_S)
        if seconds > TOLD_WAIT_S and opens > self._gate_opens + 1:
            print(f"waiting {seconds:.0f} s, as the server asks", file=sys.stderr, flush=True)
        self._gate_opens = max(self._gate_opens, opens)

    async def _gate(self) -> None:
        while (left := self._gate_opens - time.monotonic()) > 0:
            await asyncio.sleep(left * random.uniform(1, 1.1))  # not all at once

    def _learn(self, field: str) -> None:
        self.refused.append(field)
        how = {"max_tokens": "sent as max_completion_tokens"}.get(field, "sent without, or with fewer")
        self._note(f"the server does not take `{field}` as it was: {how} from now on")

    def _said_otherwise(self, body: Body) -> Body:
        for field in self.refused:
            body = _otherwise(body, field) or body
        return body

    def clean(self, text: str) -> str:
        """``text`` on one line of at most 400 characters, without control characters and without the key."""
        text = text.replace(self._key, "[key]") if self._key else text
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:400]


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not key:
        raise InputError(f"the environment variable {variable} (api_key_env) is not set: export it with the key in it")
    return key


def _delay(tries: int) -> float:
    """Seconds before the next try: up to twice as long after each, at random, so that requests do not march in step."""
    return min(FIRST_DELAY_S * 2.0 ** (tries - 1), LONGEST_DELAY_S) * random.uniform(0.5, 1)


def _connected(error: BaseException) -> bool:
    """Whether a connection stood before it was lost. Told by the cause's name: which HTTP library is below differs."""
    return type(error.__cause__).__name__ not in ("ConnectError", "ConnectTimeout")


def _json_object(content: bytes) -> Body:
    try:
        reply = loads(content.decode("utf-8"))
    except ValueError as error:  # of JSON and of UTF-8
        raise Again(f"the reply is {_brief(error)}") from None
    if not isinstance(reply, dict):
        raise Again("the reply is no JSON object")
    return reply


def _brief(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _said(error: openai.APIStatusError) -> str:
    """The server's own words, wherever in the body it puts them."""
    body = error.body
    if isinstance(body, dict):
        body = next((body[key] for key in ("message", "detail", "error") if body.get(key)), body)
    return str(body or error.response.reason_phrase)


# --- fields that a server may not take ---------------------------------------------------------------------------


def _field(error: openai.APIStatusError, said: str, body: Body) -> str | None:
    """The field that the server objects to, if it is one that can be left out or said otherwise."""
    named = getattr(error, "param", None)
    if not _NOT_TAKEN.search(said):
        return None
    fields = [named] if named in body else [field for field in body if re.search(rf"\b{re.escape(field)}\b", said)]
    return next((field for field in fields if _otherwise(body, field)), None)


def _otherwise(body: Body, field: str) -> Body | None:
    """``body`` with ``field`` said in another way that means the same to us; None where there is none.

    Newer models of OpenAI take ``max_completion_tokens`` alone, and no temperature but 1. Stop strings are cut here
    as well, so a server may go without; a seed that is not taken costs repeatability, and is told.
    """
    rest = {key: value for key, value in body.items() if key != field}
    if field == "max_tokens" and field in body:
        return {**rest, "max_completion_tokens": body[field]}
    if field == "stop" and len(body.get(field, ())) > MAX_STOPS:
        return {**rest, field: body[field][:MAX_STOPS]}
    spare = field in ("stop", "seed") or (field in ("temperature", "top_p") and body.get(field) == 1)
    return rest if spare and field in body else None

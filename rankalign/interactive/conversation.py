"""Talking to one model, or to two at once and voting on their answers; without a page or a terminal of its own.

A vote is a record as every other command reads it: the prompt, the two answers as ``base`` and ``aligned``, and scores
under the voter's name, 1 for the better, 0 for the other, one half each for a tie. Which stood on the left is drawn
from the seed and the record's id, and stands in its ``meta`` with the rest.
"""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rankalign.data import templates
from rankalign.data.records import CandidateSet, Message, Response
from rankalign.engines import Policy, SamplingParams
from rankalign.engines.hf import HFEngine
from rankalign.errors import InputError
from rankalign.interactive.votes import VoteFile
from rankalign.models import load as models

ALIGNED, BASE = "aligned", "base"
CHOICES = ("left", "right", "tie")
EMPTY = "(no answer: the model ended at once)"


@dataclass(frozen=True)
class Options:
    """How the next answer is made.

    Attributes:
        sampling: ``n`` is 1.
        template: a name in :mod:`rankalign.data.templates`.
        system: system message, or empty.
    """

    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_new_tokens=256, temperature=0.7))
    template: str = "auto"
    system: str = ""


def options(
    temperature: float,
    top_p: float,
    top_k: int,
    num_beams: int,
    max_new_tokens: int,
    seed: int = 0,
    template: str = "auto",
    system: str = "",
) -> Options:
    """Options from the positions of the sliders; with several beams the first three do not count.

    Raises:
        InputError: a value out of range.
    """
    drawn: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    chosen = {"num_beams": num_beams} if num_beams > 1 else drawn
    templates.check_name(template)
    return Options(SamplingParams(max_new_tokens=max_new_tokens, seed=seed, **chosen), template, system.strip())


def load_speaker(name: str, model: str, adapter: str = "", dtype: str = "auto", load_8bit: bool = False) -> HFEngine:
    """A model with its tokenizer, loaded, under the name that its answers will bear."""
    engine = HFEngine(Policy(name, model=model, adapter=adapter, dtype=dtype))
    quantize = "8bit" if load_8bit else ""
    engine.model = models.load_policy(model, dtype=dtype, adapter=adapter, quantize=quantize)
    engine.tokenizer = models.load_tokenizer(model)
    return engine


class Chat:
    """What all conversations of a program share.

    Args:
        speakers: one engine to talk to, or ``base`` and ``aligned``.
        seed: decides which of two answers stands on the left.
        votes: where votes go; needed for two.
        voter: whose scores they are.
    """

    def __init__(
        self, speakers: Sequence[HFEngine], seed: int = 0, votes: VoteFile | None = None, voter: str = "human"
    ) -> None:
        if not voter.strip():
            raise InputError("the voter needs a name: votes become scores under it")
        self.speakers, self.seed, self.votes, self.voter = list(speakers), seed, votes, voter
        self._asked = votes.highest if votes else 0
        self._lock = threading.Lock()

    @property
    def two(self) -> bool:
        """Whether two models answer side by side."""
        return len(self.speakers) == 2

    def next_id(self) -> str:
        """``chat-00001`` and so on, going on behind the votes on file: no id comes twice there."""
        with self._lock:
            self._asked += 1
            return f"chat-{self._asked:05d}"

    def order(self, prompt_id: str) -> list[HFEngine]:
        """The speakers from left to right for one prompt: the toss of a coin that the seed and the id determine."""
        # A text seeds Python's generator by its SHA-512, alike in every process.
        turned = random.Random(f"{self.seed} {prompt_id}").random() < 0.5
        return self.speakers[::-1] if turned and self.two else self.speakers


@dataclass(frozen=True)
class Duel:
    """Two answers that wait for a vote, from left to right.

    Attributes:
        prompt: with its id.
        responses: what stood left and right.
        options: under which both were made.
    """

    prompt: CandidateSet
    responses: tuple[Response, Response]
    options: Options


class Conversation:
    """One person's talk: what was said, and the two answers that wait for a vote.

    Attributes:
        messages: user and assistant in turn; of two answers the better went on (of a tie the left one).
        duel: the answers to vote on next, if any.
        shown: how the last answers read, from left to right.
        cut: which of them the token limit ended; what was stopped was not.
        stopping: set it to end the answers under way where they are.
    """

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.messages: list[Message] = []
        self.duel: Duel | None = None
        self.shown: list[str] = []
        self.cut: list[bool] = []
        self.stopping = threading.Event()
        self._talk = 0

    def ask(self, text: str, chosen: Options) -> Iterator[list[str]]:
        """Say something; yields what can be shown of each answer, left to right, and each time more of it.

        What was shown is never taken back: characters of several tokens wait until they are whole, and what may become
        a stop string until it is none. Two answers grow by a token in turn.

        Raises:
            InputError: nothing was said, a vote is due, or the model cannot take it; the talk stays as it was.
        """
        if not text.strip():
            raise InputError("write something first")
        if self.duel:
            raise InputError("vote on the two answers first, or begin anew")
        self.stopping.clear()
        talk = self._talk
        said = [*self.messages, {"role": "user", "content": _utf8(text)}]
        prompt = CandidateSet(self.chat.next_id(), templates.as_messages(said, _utf8(chosen.system)))
        speakers = [_under(speaker, chosen) for speaker in self.chat.order(prompt.id)]
        answers = [Response("", speaker.policy.name, finished=False) for speaker in speakers]
        stop = templates.stops(chosen.template)
        for place, answer in _in_turn([speaker.stream(prompt, self.stopping.is_set) for speaker in speakers]):
            answers[place] = answer
            yield [settled(answer.text, stop) for answer in answers]
        if self._talk != talk:  # begun anew meanwhile
            return
        self.shown = [_bare(answer.text, stop) for answer in answers]
        self.cut = [not answer.finished and not self.stopping.is_set() for answer in answers]
        if self.chat.two:
            self.duel = Duel(prompt, (answers[0], answers[1]), chosen)
        else:
            self._go_on(said, self.shown[0])
        yield self.shown

    def vote(self, choice: str) -> CandidateSet:
        """Store who was better, ``left``, ``right`` or ``tie``; returns the record.

        Raises:
            InputError: there is nothing to vote on, or the file cannot be written (then the vote is still due).
        """
        if choice not in CHOICES:
            raise InputError(f"vote {choice!r}: give one of {', '.join(CHOICES)}")
        if self.duel is None or self.chat.votes is None:
            raise InputError("there are no two answers to vote on")
        record = self._record(self.duel, choice)
        self.chat.votes.append(record)
        said = [message for message in self.duel.prompt.prompt if isinstance(message, dict)]
        self._go_on([m for m in said if m["role"] != "system"], self.shown[choice == "right"])
        self.duel = None
        return record

    def reset(self) -> None:
        """Forget everything said; answers under way end."""
        self.stopping.set()
        self._talk += 1
        self.messages, self.duel, self.shown, self.cut = [], None, [], []

    def _go_on(self, said: list[Message], answer: str) -> None:
        self.messages = [*said, {"role": "assistant", "content": answer}]

    def _record(self, duel: Duel, choice: str) -> CandidateSet:
        left = 0.5 if choice == "tie" else float(choice == "left")
        marks = ((duel.responses[0], left), (duel.responses[1], 1 - left))
        responses = [dataclasses.replace(r, scores={self.chat.voter: score}) for r, score in marks]
        meta = {
            "vote": choice,
            "voter": self.chat.voter,
            "left": responses[0].policy,
            "right": responses[1].policy,
            "order_seed": self.chat.seed,
            "template": duel.options.template,
            "models": {s.policy.name: _where(s.policy) for s in self.chat.speakers},
        }
        named = sorted(responses, key=lambda r: r.policy != BASE)
        return CandidateSet(duel.prompt.id, duel.prompt.prompt, named, meta)


def settled(text: str, stop: Sequence[str]) -> str:
    """The part of a growing answer that no later token changes.

    Args:
        text: the answer so far.
        stop: strings that end it; under such a template blanks at both ends do not count.
    """
    text = text.rstrip("\ufffd")  # perhaps the first bytes of a character
    held = max((n for mark in stop for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)
    return _bare(text[: len(text) - held], stop)


def _bare(text: str, stop: Sequence[str]) -> str:
    return text.strip() if stop else text


def _under(speaker: HFEngine, chosen: Options) -> HFEngine:
    """The speaker's model under these options; the system message stands in the prompt already."""
    return speaker.under(dataclasses.replace(speaker.policy, template=chosen.template, sampling=chosen.sampling))


def _where(policy: Policy) -> str:
    return f"{policy.model} + {policy.adapter}" if policy.adapter else policy.model


def _in_turn(streams: Sequence[Iterator[Response]]) -> Iterator[tuple[int, Response]]:
    """What each stream gives, a piece of every one in turn, with its place."""
    going = list(enumerate(streams))
    while going:
        for found in tuple(going):
            response = next(found[1], None)
            if response is None:
                going.remove(found)
            else:
                yield found[0], response


def _utf8(text: str) -> str:
    """The text with halves of surrogate pairs, which no record can hold, made question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")

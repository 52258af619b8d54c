"""Scores by a language model that reads the answers: any engine can be the judge.

A call to the judge is a prompt like any other, so a judge may be a model in this process, a server, or verdicts that
exist already (``replay``). What is shown in which order is drawn from (seed, record id, judge name, round) alone.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rankalign.config import build
from rankalign.data.messages import message_text, tool_names
from rankalign.data.records import (
    CandidateSet,
    Checker,
    Message,
    Response,
    parse_response,
    response_to_dict,
)
from rankalign.engines import ENGINES, Engine, Policy
from rankalign.engines.settings import policy_settings
from rankalign.errors import InputError
from rankalign.registry import did_you_mean
from rankalign.scorers import Explanation
from rankalign.scorers.aggregate import RULES, aggregate
from rankalign.scorers.case import Call, Case, counts, given, mean, rankings
from rankalign.scorers.hardening import GUARD, fence, harden
from rankalign.scorers.judge_prompts import TYPES, find_prompt
from rankalign.storage.journal import Calls, Remembering, content_digest

DEFAULTS = {"temperature": 0.0, "max_new_tokens": 512}
RULE = {"pairwise": "bradley-terry", "listwise": "borda"}
REPAIR = "Your verdict could not be read. Write it again, in this form, and nothing else:\n{form}"
QUOTED = 2000
"""Most characters of its own text that a judge is shown when it is asked for its verdict again."""


class JudgeScorer:
    """Asks a language model to grade, compare or order the responses of a prompt.

    ``pointwise``: each text alone, its axes summed. ``pairwise``: two texts a call, every pair in both orders; a pair
    counts if both verdicts could be read. ``listwise``: all texts in one call, shuffled anew in each round. Comparisons
    become scores by a rule of :data:`rankalign.scorers.aggregate.RULES`. Where nothing could be read the score is None.

    Args:
        name: key of the scores.
        policy: who judges: the keys of a policy of ``rankalign sample``; greedy, 512 tokens unless it says otherwise.
        mode: ``pointwise``, ``pairwise`` or ``listwise``.
        prompt: name of a shipped prompt, ``file.jsonl`` or ``file.jsonl:name``; empty takes the mode's own.
        axes: names of the prompt's axes to use, or other ones as a mapping from name to meaning.
        aggregate: the rule; empty takes Bradley-Terry for pairs and Borda for lists. Grades are summed, not aggregated.
        rounds: listwise: how many shuffled lists.
        opponents: pairwise: how many others each text meets; 0 is all.
        seed: seed of the orders shown.
        repair: ask once more, for the verdict alone, where none could be read or the token limit cut the text.
        hardened: put texts between tags with a nonce and break what imitates a verdict; see
            :mod:`rankalign.scorers.hardening`.
        repeats: how often to ask each question, each time under another seed: all verdicts count, and how many came
            out as the first time is reported as ``repeatability``. Ask at a temperature above 0.
        thoughts: ``drop`` shows answers and dialogues without what models thought, ``keep`` with it.

    Raises:
        InputError: an option is wrong; the message names it.
    """

    def __init__(
        self,
        name: str,
        policy: Mapping[str, Any],
        mode: str = "pointwise",
        prompt: str = "",
        axes: Sequence[str] | Mapping[str, str] | None = None,
        aggregate: str = "",
        rounds: int = 1,
        opponents: int = 0,
        seed: int = 0,
        repair: bool = True,
        hardened: bool = True,
        repeats: int = 1,
        thoughts: str = "drop",
    ) -> None:
        self.name, self.mode, self.seed, self.repair, self.hardened = name, mode, seed, repair, hardened
        self.rounds, self.opponents, self.repeats, self.thoughts = rounds, opponents, repeats, thoughts
        self._cases: list[Case] = []
        self._calls = Calls(name=name)
        try:
            self._check_options()
            self.prompt = find_prompt(prompt, mode)
            self.prompt = self.prompt if axes is None else self.prompt.with_axes(axes)
            self.rule = _rule(aggregate, mode, self.prompt.additive)
            self.policy = _policy(name, policy, repair)
        except InputError as error:
            raise InputError(f"scorer {name!r}: {error}") from None

    def _check_options(self) -> None:
        if self.mode not in TYPES:
            raise InputError(f"mode: {self.mode!r} is unknown{did_you_mean(str(self.mode), TYPES)}")
        if self.thoughts not in ("drop", "keep"):
            raise InputError(f"thoughts: {self.thoughts!r} is neither drop nor keep")
        for option, least in (("rounds", 1), ("opponents", 0), ("seed", 0), ("repeats", 1)):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{option}: expected a whole number of at least {least}, found {value!r}")
        for option in ("repair", "hardened"):
            if not isinstance(getattr(self, option), bool):
                raise InputError(f"{option}: expected true or false, found {getattr(self, option)!r}")
        for option, mode, unset in (("rounds", "listwise", 1), ("opponents", "pairwise", 0)):
            if getattr(self, option) != unset and self.mode != mode:
                raise InputError(f"{option}: only mode {mode} has them")

    @functools.cached_property
    def engine(self) -> Engine:
        """Who writes the verdicts, built on first use."""
        engine: Engine = ENGINES.load(self.policy.engine)(self.policy)
        return engine

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """One score a response."""
        self._cases = [self.case(record) for record in sets]
        calls = [call for case in self._cases for call in case.calls]
        for call, reply in zip(calls, self._ask([call.prompt for call in calls]), strict=True):
            self._take(call, reply)
        unread = [call for call in calls if call.verdict is None and call.failed is None] if self.repair else []
        for call, reply in zip(unread, self._ask([self._again(call) for call in unread]), strict=True):
            call.repair = reply.text if isinstance(reply, Response) else ""
            self._take(call, reply, again=True)
        return [[scores[place] for place in case.places] for case in self._cases for scores in [self._scores(case)]]

    def explain(self) -> list[Explanation]:
        """The judge's texts, sub-scores and counts for each record of the last batch."""
        return [self._explanation(case) for case in self._cases]

    def fingerprint(self) -> dict[str, Any]:
        """Policy with hashes of its weights, mode, words of the prompt, seed and rule."""
        prompt = self.prompt
        words = [prompt.system, prompt.template, prompt.output, list(prompt.axes.items()), GUARD, REPAIR]
        return {
            "kind": "judge",
            "policy": policy_settings(self.policy),
            "mode": self.mode,
            "prompt": prompt.name,
            "prompt_sha256": hashlib.sha256(json.dumps(words).encode()).hexdigest(),
            "aggregate": self.rule,
            **{option: getattr(self, option) for option in ("rounds", "opponents", "seed", "repair", "hardened")},
            **({"thoughts": self.thoughts} if self.thoughts != "drop" else {}),
            **({"repeats": self.repeats} if self.repeats > 1 else {}),  # outputs of before the option stay finished
        }

    # --- asking ------------------------------------------------------------------------------------------------------

    def case(self, record: CandidateSet) -> Case:
        """A record with the questions to be asked about it; asks nothing."""
        answers = [response.shown(self.thoughts == "keep") for response in record.responses]
        texts = list(dict.fromkeys(answers))
        hardened = [harden(text, self.prompt.axes) for text in texts]
        places = [texts.index(answer) for answer in answers]
        case = Case(record, texts, places, [attempts for _, attempts in hardened])
        shown_texts = [text for text, _ in hardened] if self.hardened else texts
        shows = list(enumerate(self._shows(record.id, len(texts))))
        for repeat, (number, shown) in itertools.product(range(self.repeats), shows):
            messages = self._messages(record, [shown_texts[i] for i in shown])
            ident = f"{record.id}/{self.name}/{number}" + (f"/again-{repeat}" if repeat else "")
            prompt = CandidateSet(ident, messages, meta={"record": record.id})
            case.calls.append(Call(shown, prompt, question=number, repeat=repeat))
        return case

    def _shows(self, ident: str, count: int) -> list[tuple[int, ...]]:
        """Which texts to show together, each in the order to show them."""
        if self.mode == "pointwise":
            return [(i,) for i in range(count)]
        if self.mode == "listwise":
            least = 1 if self.prompt.additive else 2
            return [tuple(self._shuffled(ident, count, r)) for r in range(self.rounds)] if count >= least else []
        games = pairings(self._shuffled(ident, count, 0), self.opponents)
        return [shown for a, b in games for shown in ((a, b), (b, a))]

    def _shuffled(self, ident: str, count: int, number: int) -> list[int]:
        """``range(count)`` in an order that depends on record, judge, seed and round alone."""
        keys = [_digest(self.seed, ident, self.name, number, i) for i in range(count)]
        return sorted(range(count), key=keys.__getitem__)

    def _messages(self, record: CandidateSet, texts: Sequence[str]) -> list[Message]:
        keep = self.thoughts == "keep"
        question = _words(record, keep)
        system = self.prompt.system
        labels = [f"answer_{k}" for k in range(1, len(texts) + 1)]
        if self.mode != "listwise":
            labels = ["answer"] if self.mode == "pointwise" else ["answer_a", "answer_b"]
        if self.hardened:
            # It depends on the texts, so no text can hold it, whoever knows seed, record and judge.
            nonce = _digest(self.seed, record.id, self.name, question, *texts)[:12]
            system = f"{system}\n\n{GUARD.format(nonce=nonce)}".strip()
            question = fence("request", _words(record, keep, lambda text: harden(text)[0]), nonce)
            texts = [fence(label, text, nonce) for label, text in zip(labels, texts, strict=True)]
        listed = "\n\n".join(f"Answer {k}:\n{text}" for k, text in enumerate(texts, start=1))
        in_line = " ".join(f"Response {k}: {text}" for k, text in enumerate(texts, start=1))
        lists = {"answers": listed, "responses": in_line}
        asked = self.prompt.fill({"question": question, **lists, **dict(zip(labels, texts, strict=True))})
        return [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": asked}]

    def remember(self, calls: Calls) -> None:
        """Keep replies in ``calls``, and look there before asking; a later run pays for the others alone."""
        self._calls = calls
        if isinstance(self.engine, Remembering):
            self.engine.remember(calls)

    def _ask(self, prompts: Sequence[CandidateSet]) -> list[Response | dict[str, Any]]:
        """A reply to each prompt, or why there is none."""
        replies: dict[int, Response | dict[str, Any]] = {}
        for batch in self.engine.batches(prompts) if prompts else []:
            asked = [prompts[i] for i in batch]
            answers = self._fetch(asked)
            failed = getattr(self.engine, "failed", {})
            for index, prompt, answer in zip(batch, asked, answers, strict=True):
                replies[index] = answer[0] if answer else failed[prompt.id][0]
        return [replies[index] for index in range(len(prompts))]

    def _fetch(self, asked: list[CandidateSet]) -> list[list[Response]]:
        """One batch of an engine, kept as a whole unless the engine keeps its answers one by one."""
        if isinstance(self.engine, Remembering) or not self._calls:
            return self.engine.generate(asked)
        digests = [content_digest([prompt.prompt, self.fingerprint()["policy"]]) for prompt in asked]
        kept = [self._calls.find(prompt.id, digest) for prompt, digest in zip(asked, digests, strict=True)]
        if all(reply is not None for reply in kept):  # the whole batch or nothing: batch mates change the last bits
            return [[parse_response(Checker("journal", 0), reply, "reply")] for reply in kept]
        answers = self.engine.generate(asked)
        self._calls.keep(
            (prompt.id, digest, response_to_dict(answer[0]))
            for prompt, digest, answer in zip(asked, digests, answers, strict=True)
        )
        return answers

    def _again(self, call: Call) -> CandidateSet:
        """The follow-up that asks for the verdict alone."""
        # Its end, where a verdict was tried.
        said = {"role": "assistant", "content": call.text[-QUOTED:].strip() or "..."}
        request = {"role": "user", "content": REPAIR.format(form=self.prompt.form)}
        return CandidateSet(f"{call.prompt.id}/repair", [*call.prompt.prompt, said, request], meta=call.prompt.meta)

    # --- judging -----------------------------------------------------------------------------------------------------

    def _take(self, call: Call, reply: Response | dict[str, Any], again: bool = False) -> None:
        """Note what came of a question; what the token limit cut is no verdict, whatever stands in it."""
        if not isinstance(reply, Response):
            call.failed = {key: reply[key] for key in ("reason", "tries")}
            return
        if not again:
            call.text = reply.text
        call.verdict = self.prompt.read(reply.text, len(call.shown)) if reply.finished else None

    def _scores(self, case: Case) -> list[float | None]:
        """One score a distinct text."""
        count = len(case.texts)
        if not self.prompt.additive:
            return [0.0] * count if count < 2 else aggregate(rankings(case, self.mode), count, self.rule)
        means = [mean(given(case, place)) for place in range(count)]
        return [sum(ratings.values()) if ratings else None for ratings in means]

    def _explanation(self, case: Case) -> Explanation:
        first = {place: case.places.index(place) for place in case.places}
        calls = [
            {"shown": [first[place] for place in call.shown], "text": call.text, "verdict": call.verdict}
            | ({} if call.repair is None else {"repair": call.repair})
            | ({} if call.failed is None else {"failed": call.failed})
            for call in case.calls
        ]
        responses = []
        for place in case.places:
            ratings = mean(given(case, place)) if self.prompt.additive else {}
            found = {"ratings": ratings, "attempts": case.attempts[place]}
            responses.append({key: value for key, value in found.items() if value})
        return Explanation({"counts": counts(case, self.mode), "calls": calls}, responses)


def pairings(order: Sequence[int], opponents: int = 0) -> list[tuple[int, int]]:
    """Who meets whom: all pairs, or neighbours on the ring ``order``, nearest first, while both have a game to play."""
    count = len(order)
    everyone = sorted(itertools.combinations(range(count), 2), key=lambda p: min(p[1] - p[0], count + p[0] - p[1]))
    most, games, met = opponents or count, [], Counter[int]()
    for a, b in everyone:
        if met[a] < most and met[b] < most:
            met.update((a, b))
            games.append((order[a], order[b]))
    return games


def _words(record: CandidateSet, thoughts: bool = False, show: Callable[[str], str] = str) -> str:
    """A prompt as text; who spoke is named where there is more than the user's one message, and tools where there are
    any."""
    prompt, tools = record.prompt, tool_names(record.meta)
    listed = [f"Tools: {show(', '.join(tools))}"] if tools else []
    if isinstance(prompt, str):
        return "\n\n".join([*listed, show(prompt)])
    if len(prompt) == 1 and not listed:
        return show(message_text(prompt[0], thoughts))
    told = [f"{message['role'].capitalize()}: {show(message_text(message, thoughts))}" for message in prompt]
    return "\n\n".join([*listed, *told])


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _rule(rule: str, mode: str, additive: bool) -> str:
    if additive:
        if rule:
            raise InputError(f"aggregate: {rule!r} is for orders and pairs; this prompt's grades are summed")
        return "sum"
    rule = rule or RULE[mode]
    if rule not in RULES:
        raise InputError(f"aggregate: {rule!r} is unknown{did_you_mean(str(rule), RULES)}")
    return rule


def _policy(name: str, options: Mapping[str, Any], repair: bool) -> Policy:
    if not isinstance(options, Mapping):
        raise InputError("policy: expected a mapping such as {engine: hf, model: default}")
    policy = build(Policy, {"name": name, **({} if "sampling" in options else DEFAULTS), **options}, "policy")
    if policy.sampling.n != 1:
        raise InputError("policy: n must be 1; a judge is asked once")
    if policy.template == "alpaca" and repair:
        raise InputError("repair: template 'alpaca' has no second turn; set repair to false or use another template")
    return policy

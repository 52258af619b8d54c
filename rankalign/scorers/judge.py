"""Scores by a language model that reads the answers: any engine can be the judge.

A call to the judge is a prompt like any other, so a judge may be a model in this process, a server, or verdicts that
exist already (``replay``). What is shown in which order is drawn from (seed, record id, judge name, round) alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rankalign.data.records import CandidateSet, Message, Response
from rankalign.errors import InputError
from rankalign.registry import did_you_mean
from rankalign.scorers import Explanation
from rankalign.scorers.aggregate import RULES, aggregate
from rankalign.scorers.asking import Asker, Reply, asked_policy, question_text
from rankalign.scorers.case import Call, Case, counts, given, mean, rankings, spread
from rankalign.scorers.criteria import (
    FIELDS,
    LABELS,
    Criterion,
    asked_by,
    criteria_of,
    read_criteria,
    reference_of,
    worth,
)
from rankalign.scorers.expected import LOGPROBS, SCALES, expected
from rankalign.scorers.hardening import GUARD, fence, harden
from rankalign.scorers.judge_prompts import TYPES, JudgePrompt, find_prompt
from rankalign.scorers.written import RubricWriter, Written
from rankalign.storage.journal import Calls

DEFAULTS = {"temperature": 0.0, "max_new_tokens": 512}
RULE = {"pairwise": "bradley-terry", "listwise": "borda"}
REPAIR = "Your verdict could not be read. Write it again, in this form, and nothing else:\n{form}"
QUOTED = 2000
"""Most characters of its own text that a judge is shown when it is asked for its verdict again."""
YOUNG = {"thoughts": "drop", "repeats": 1, "weighted": False, "field": ""}
"""Options that count in a fingerprint only where they are set, so that outputs of before them stay finished."""


class JudgeScorer:
    """Asks a language model to grade, compare or order the responses of a prompt.

    ``pointwise``: each text alone, its axes summed. ``reference``: the same beside the record's reference answer.
    ``rubric`` and ``checklist``: each text alone by the criteria of its record, weighed here. ``pairwise``: two texts a
    call, every pair in both orders; a pair counts if both verdicts could be read. ``listwise``: all texts in one call,
    shuffled anew in each round. Comparisons become scores by a rule of :data:`rankalign.scorers.aggregate.RULES`. Where
    nothing could be read the score is None.

    Args:
        name: key of the scores.
        policy: who judges: the keys of a policy of ``rankalign sample``; greedy, 512 tokens unless it says otherwise.
        mode: ``pointwise``, ``reference``, ``rubric``, ``checklist``, ``pairwise`` or ``listwise``.
        prompt: name of a shipped prompt, ``file.jsonl`` or ``file.jsonl:name``; empty takes the mode's own.
        axes: names of the prompt's axes to use, or other ones as a mapping from name to meaning.
        aggregate: the rule; empty takes Bradley-Terry for pairs and Borda for lists. Grades are summed, not aggregated.
        rounds: listwise: how many shuffled lists.
        opponents: pairwise: how many others each text meets; 0 is all.
        seed: seed of the orders shown.
        repair: ask once more, for the verdict alone, where none could be read or the token limit cut the text.
        hardened: put texts between tags with a nonce and break what imitates a verdict; see
            :mod:`rankalign.scorers.hardening`.
        repeats: how often to ask each question, each time under another seed: all verdicts count, how far a text's
            scores lie apart is kept as ``spread``, and how many verdicts came out as the first time is reported as
            ``repeatability``. Ask at a temperature above 0.
        thoughts: ``drop`` shows answers and dialogues without what models thought, ``keep`` with it.
        weighted: the grade is the expected one by the judge's own probabilities, see
            :mod:`rankalign.scorers.expected`; for verdicts on axes from 1 to 5 and checklists, and engines that give
            log-probabilities.
        field: key of the records' ``meta`` that holds the rubric, checklist or reference answer; empty is the mode's
            name, or ``reference`` where another mode's prompt shows one.
        writer: rubric, checklist: who writes the criteria of a record that has none, as ``policy``.

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
        weighted: bool = False,
        field: str = "",
        writer: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.mode, self.seed, self.repair, self.hardened = name, mode, seed, repair, hardened
        self.rounds, self.opponents, self.repeats, self.thoughts = rounds, opponents, repeats, thoughts
        self.weighted, self.field = weighted, field
        self._cases: list[Case] = []
        try:
            self._check_options()
            self.prompt = find_prompt(prompt, mode)
            self.prompt = self.prompt if axes is None else self.prompt.with_axes(axes)
            self.rule = _rule(aggregate, mode, self.prompt)
            self._check_prompt()
            defaults = {**DEFAULTS, "logprobs": LOGPROBS} if weighted else DEFAULTS
            self.judge = Asker(asked_policy(name, policy, defaults, repair))
            if weighted and not self.judge.policy.sampling.logprobs:
                raise InputError("weighted: the policy's logprobs must be above 0")
            self._writer = None if writer is None else RubricWriter(name, writer, mode, hardened, repair)
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
        for option in ("repair", "hardened", "weighted"):
            if not isinstance(getattr(self, option), bool):
                raise InputError(f"{option}: expected true or false, found {getattr(self, option)!r}")
        for option, mode, unset in (("rounds", "listwise", 1), ("opponents", "pairwise", 0)):
            if getattr(self, option) != unset and self.mode != mode:
                raise InputError(f"{option}: only mode {mode} has them")

    def _check_prompt(self) -> None:
        if self.weighted and self.prompt.output not in SCALES:
            raise InputError(
                f"weighted: a verdict {self.prompt.output} has no grade in one token; take a prompt whose verdict is "
                "axes from 1 to 5, or mode rubric or checklist"
            )
        if self.field and self.mode not in LABELS and not self.prompt.shows_reference:
            raise InputError(f"field: nothing of a record is read in mode {self.mode} with this prompt")

    @property
    def engine(self) -> Any:
        """Who writes the verdicts."""
        return self.judge.engine

    @property
    def policy(self) -> Any:
        """The judge's policy."""
        return self.judge.policy

    def remember(self, calls: Calls) -> None:
        """Keep replies in ``calls``, and look there before asking; a later run pays for the others alone."""
        self.judge.remember(calls)
        if self._writer:
            self._writer.remember(calls)

    @property
    def goes_by_records(self) -> bool:
        """Whether records have to hold something beside prompt and answers."""
        return self.mode in LABELS or self.prompt.shows_reference

    def check(self, record: CandidateSet) -> None:
        """Look whether a record can be judged, before anything is paid for.

        Raises:
            RecordError: it lacks the rubric, checklist or reference answer that the judge goes by.
        """
        if self.prompt.shows_reference:
            reference_of(record, self._field("reference"))
        if self.mode in LABELS and not (self._writer and record.meta.get(self._field(self.mode)) is None):
            criteria_of(record, self._field(self.mode), self.mode)

    def _field(self, what: str) -> str:
        own = self.field if what == self.mode or self.mode not in LABELS else ""
        return own or FIELDS[what]

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """One score a response.

        Raises:
            RecordError: a record lacks what the judge goes by.
        """
        for record in sets:
            self.check(record)
        written = self._write(sets)
        self._cases = [self.case(record, told) for record, told in zip(sets, written, strict=True)]
        calls = [call for case in self._cases for call in case.calls]
        for call, reply in zip(calls, self.judge.ask([call.prompt for call in calls]), strict=True):
            self._take(call, reply)
        unread = [call for call in calls if call.verdict is None and call.failed is None] if self.repair else []
        for call, reply in zip(unread, self.judge.ask([self._again(call) for call in unread]), strict=True):
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
            "policy": self.judge.settings,
            "mode": self.mode,
            "prompt": prompt.name,
            "prompt_sha256": hashlib.sha256(json.dumps(words).encode()).hexdigest(),
            "aggregate": self.rule,
            **{option: getattr(self, option) for option in ("rounds", "opponents", "seed", "repair", "hardened")},
            **{option: getattr(self, option) for option, unset in YOUNG.items() if getattr(self, option) != unset},
            **({"writer": self._writer.fingerprint()} if self._writer else {}),
        }

    # --- asking ------------------------------------------------------------------------------------------------------

    def _write(self, sets: Sequence[CandidateSet]) -> list[Written | None]:
        """What the writer says of each record that has no criteria; None of the others."""
        if self._writer is None:
            return [None] * len(sets)
        bare = [record for record in sets if record.meta.get(self._field(self.mode)) is None]
        told = iter(self._writer.write(bare, [question_text(record, show=self._writer.show) for record in bare]))
        return [next(told) if record.meta.get(self._field(self.mode)) is None else None for record in sets]

    def case(self, record: CandidateSet, written: Written | None = None) -> Case:
        """A record with the questions to be asked about it; asks nothing.

        Args:
            record: prompt and responses.
            written: of a record without criteria, what the writer made of it.
        """
        answers = [response.shown(self.thoughts == "keep") for response in record.responses]
        texts = list(dict.fromkeys(answers))
        criteria = self._criteria(record, written)
        prompt = asked_by(self.prompt, criteria, self.mode, self.hardened) if self.mode in LABELS else self.prompt
        hardened = [harden(text, prompt.axes) for text in texts]
        places = [texts.index(answer) for answer in answers]
        case = Case(record, texts, places, [attempts for _, attempts in hardened], prompt, criteria, written=written)
        if self.mode in LABELS and not criteria:  # the writer wrote none that can be used
            return case
        shown_texts = [text for text, _ in hardened] if self.hardened else texts
        shows = list(enumerate(self._shows(record.id, len(texts))))
        for repeat, (number, shown) in itertools.product(range(self.repeats), shows):
            messages = self._messages(record, [shown_texts[i] for i in shown], prompt)
            ident = f"{record.id}/{self.name}/{number}" + (f"/again-{repeat}" if repeat else "")
            asked = CandidateSet(ident, messages, meta={"record": record.id})
            case.calls.append(Call(shown, asked, prompt, question=number, repeat=repeat))
        return case

    def _criteria(self, record: CandidateSet, written: Written | None) -> list[Criterion]:
        """What a record is graded by; nothing where the mode has no criteria, or the writer wrote none."""
        if self.mode not in LABELS:
            return []
        if written is None:
            return criteria_of(record, self._field(self.mode), self.mode)
        return read_criteria(written.criteria, self.mode) if written.criteria else []

    def _shows(self, ident: str, count: int) -> list[tuple[int, ...]]:
        """Which texts to show together, each in the order to show them."""
        if self.mode == "listwise":
            least = 1 if self.prompt.additive else 2
            return [tuple(self._shuffled(ident, count, r)) for r in range(self.rounds)] if count >= least else []
        if self.mode != "pairwise":
            return [(i,) for i in range(count)]
        games = pairings(self._shuffled(ident, count, 0), self.opponents)
        return [shown for a, b in games for shown in ((a, b), (b, a))]

    def _shuffled(self, ident: str, count: int, number: int) -> list[int]:
        """``range(count)`` in an order that depends on record, judge, seed and round alone."""
        keys = [_digest(self.seed, ident, self.name, number, i) for i in range(count)]
        return sorted(range(count), key=keys.__getitem__)

    def _messages(self, record: CandidateSet, texts: Sequence[str], prompt: JudgePrompt) -> list[Message]:
        keep = self.thoughts == "keep"
        question, system = question_text(record, keep), prompt.system
        reference = reference_of(record, self._field("reference")) if prompt.shows_reference else ""
        labels = [f"answer_{k}" for k in range(1, len(texts) + 1)]
        if self.mode != "listwise":
            labels = ["answer_a", "answer_b"] if self.mode == "pairwise" else ["answer"]
        if self.hardened:
            # It depends on the texts, so no text can hold it, whoever knows seed, record and judge.
            nonce = _digest(self.seed, record.id, self.name, question, *texts, *([reference] * bool(reference)))[:12]
            system = f"{system}\n\n{GUARD.format(nonce=nonce)}".strip()
            question = fence("request", question_text(record, keep, lambda text: harden(text)[0]), nonce)
            texts = [fence(label, text, nonce) for label, text in zip(labels, texts, strict=True)]
            reference = fence("reference", harden(reference, prompt.axes)[0], nonce)
        listed = "\n\n".join(f"Answer {k}:\n{text}" for k, text in enumerate(texts, start=1))
        in_line = " ".join(f"Response {k}: {text}" for k, text in enumerate(texts, start=1))
        lists = {"answers": listed, "responses": in_line, "reference": reference}
        asked = prompt.fill({"question": question, **lists, **dict(zip(labels, texts, strict=True))})
        return [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": asked}]

    def _again(self, call: Call) -> CandidateSet:
        """The follow-up that asks for the verdict alone."""
        # Its end, where a verdict was tried.
        said = {"role": "assistant", "content": call.text[-QUOTED:].strip() or "..."}
        request = {"role": "user", "content": REPAIR.format(form=call.asked.form)}
        return CandidateSet(f"{call.prompt.id}/repair", [*call.prompt.prompt, said, request], meta=call.prompt.meta)

    # --- judging -----------------------------------------------------------------------------------------------------

    def _take(self, call: Call, reply: Reply, again: bool = False) -> None:
        """Note what came of a question; what the token limit cut is no verdict, whatever stands in it."""
        if not isinstance(reply, Response):
            call.failed = {key: reply[key] for key in ("reason", "tries")}
            return
        if not again:
            call.text = reply.text
        call.verdict = call.asked.read(reply.text, len(call.shown)) if reply.finished else None
        if self.weighted and call.verdict is not None:
            self._weigh(call, reply)

    def _weigh(self, call: Call, reply: Response) -> None:
        """Expected grades in the place of those that were written; a verdict that has none is unreadable."""
        if not (told := reply.meta.get("logprobs")):
            raise InputError(
                f"scorer {self.name!r}: weighted: the judge's replies came without log-probabilities; ask a server "
                "that sends them (vllm serve does) or a model of engine hf, or leave weighted out"
            )
        found = expected(call.asked, told, call.verdict[0]) if call.verdict else None
        call.verdict = None if found is None else [found[0]]
        call.mass = None if found is None else found[1]

    def _scores(self, case: Case) -> list[float | None]:
        """One score a distinct text."""
        count = len(case.texts)
        if not self.prompt.additive:
            return [0.0] * count if count < 2 else aggregate(rankings(case, self.mode), count, self.rule)
        means = [mean(given(case, place)) for place in range(count)]
        return [self._worth(case, ratings) if ratings else None for ratings in means]

    def _worth(self, case: Case, ratings: Mapping[str, float]) -> float:
        return worth(ratings, case.criteria, self.mode) if case.criteria else sum(ratings.values())

    def _spreads(self, case: Case) -> list[float | None]:
        """Of each distinct text, how far the scores of its single repeats lie apart."""
        if self.repeats == 1:
            return [None] * len(case.texts)
        each = [self._scores(dataclasses.replace(case, calls=own)) for own in case.by_repeat()]
        return [spread([scores[place] for scores in each]) for place in range(len(case.texts))]

    def _explanation(self, case: Case) -> Explanation:
        first = {place: case.places.index(place) for place in case.places}
        calls = [
            {"shown": [first[place] for place in call.shown], "text": call.text, "verdict": call.verdict}
            | ({} if call.repair is None else {"repair": call.repair})
            | ({} if call.failed is None else {"failed": call.failed})
            | ({} if call.mass is None else {"mass": call.mass})
            for call in case.calls
        ]
        responses, spreads = list[dict[str, Any]](), self._spreads(case)
        for place in case.places:
            ratings = mean(given(case, place)) if self.prompt.additive else {}
            found = {"ratings": ratings, "attempts": case.attempts[place]}
            apart = {} if spreads[place] is None else {"spread": spreads[place]}
            responses.append({key: value for key, value in found.items() if value} | apart)
        told: dict[str, Any] = {"counts": counts(case, self.mode), "calls": calls}
        if case.written is None:
            return Explanation(told, responses)
        told["counts"] |= case.written.counts
        meta = {self._field(self.mode): case.written.criteria} if case.written.criteria else {}
        return Explanation(told | {"written": case.written.told()}, responses, meta)


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


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _rule(rule: str, mode: str, prompt: JudgePrompt) -> str:
    if prompt.additive:
        if rule:
            raise InputError(f"aggregate: {rule!r} is for orders and pairs; this prompt's grades are summed")
        return "weights" if mode in LABELS else "sum"
    rule = rule or RULE[mode]
    if rule not in RULES:
        raise InputError(f"aggregate: {rule!r} is unknown{did_you_mean(str(rule), RULES)}")
    return rule

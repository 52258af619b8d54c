"""Sampling and scoring: resumable passes over a journal. Killed anywhere, they end in the uninterrupted run's file."""

from __future__ import annotations

import dataclasses
import functools
import sys
import typing
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankalign.config import SampleConfig, ScoreConfig, ScorerConfig, convert
from rankalign.data.convert import Intake
from rankalign.data.load import load
from rankalign.data.records import CandidateSet, Checker, Response, parse_response, response_to_dict
from rankalign.data.spool import Spool, View
from rankalign.engines import ENGINES, Engine, Policy
from rankalign.engines.settings import policy_settings
from rankalign.errors import InputError, RecordError
from rankalign.scorers import JUDGE, SCORERS, Looking, Scorer, attach, grade
from rankalign.stages.shards import Collected, collect
from rankalign.stages.stage import Batch, Find, Ledger, Plan, Scale, Stage, partial, run_plans
from rankalign.storage import manifest
from rankalign.storage.code import as_input_error, find, hash_of, is_code
from rankalign.storage.journal import Calls, Remembering
from rankalign.storage.jsonl import dumps
from rankalign.storage.sources import sha256_of

SCORE_BATCH = 32  # records handed to a scorer at once; what a judge was paid for is kept call by call

# Settings that say what goes in: items are keyed by content, so that a begun run goes on where these change.
INPUTS = {
    "sample": ("prompts", "max_prompts", "skip_invalid", "ignore_columns"),
    "score": ("input", "skip_invalid", "ignore_columns"),
}


# --- sampling ----------------------------------------------------------------------------------------------------


def sample(
    config: SampleConfig,
    answerer: Callable[[Policy], Answerer] | None = None,
    describe: Callable[[Policy], dict[str, Any]] = policy_settings,
) -> dict[str, Any]:
    """Let every policy answer every prompt.

    Responses stand in the order of the policies, then of their index; identical texts of one policy are merged with
    their count.

    Args:
        config: settings.
        answerer: makes who answers for a policy: :class:`Answerer`, or one around weights that lie in no folder.
        describe: everything that a policy's answers depend on.

    Returns:
        ``{"output", "already_finished", "prompts", "responses", ...}``.

    Raises:
        InputError: bad settings, prompts or models; what was finished stays in the journal.
    """
    if not config.policies:
        raise InputError("policies: name at least one")
    names = [policy.name for policy in config.policies]
    if "" in map(str.strip, names):
        raise InputError("policies: each needs a name that is not empty; responses are told apart by it")
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"policies: the name {', '.join(sorted(twice))} stands twice; responses are told apart by it")
    intake, make = Intake(config.skip_invalid, config.ignore_columns), answerer or Answerer
    policies = [seeded(policy, config.seed) for policy in config.policies]

    @functools.cache
    def prompts() -> Sequence[CandidateSet]:  # read where there is work to do, and once
        found = _prompts(config.prompts, config.max_prompts, intake)
        return _readable(found, [make(policy) for policy in policies], intake) if config.skip_invalid else found

    settings = {
        "prompts": sha256_of(config.prompts),
        "max_prompts": config.max_prompts,
        "policies": [describe(policy) for policy in policies],
        **_reading(config),
    }
    stage = Stage(
        "sample",
        Path(config.prompts),
        Path(config.output),
        settings,
        config.shard,
        config.overwrite,
        inputs=INPUTS["sample"],
        on_error=config.on_error,
        retry_failed=config.retry_failed,
    )
    scale = Scale(config.shard, config.runner, config.workers)
    return stage.run(
        lambda ledger: _sample(prompts(), [make(policy) for policy in policies], scale, ledger),
        lambda find: _answered(prompts(), names, find),
        lambda: _left_out(intake),
        prompts,
    )


def _prompts(path: str | Path, most: int, intake: Intake) -> Sequence[CandidateSet]:
    prompts = Spool(load(path, "auto", intake))
    return prompts[:most] if most else prompts


def _readable(prompts: Sequence[CandidateSet], workers: list[Answerer], intake: Intake) -> Sequence[CandidateSet]:
    """The prompts that every policy's template takes; ``intake`` gets the errors of the others."""
    return _passing(prompts, [check for worker in workers if (check := getattr(worker.engine, "check", None))], intake)


def _gradable(sets: Sequence[CandidateSet], graders: list[Grader], intake: Intake) -> Sequence[CandidateSet]:
    """The records that hold what every scorer goes by, all looked at before the first call is paid for."""
    looking = [each.scorer for each in graders if isinstance(each.scorer, Looking) and each.scorer.goes_by_records]
    return _passing(sets, [scorer.check for scorer in looking], intake) if looking else sets


def _passing(
    prompts: Sequence[CandidateSet], checks: Sequence[Callable[[CandidateSet], None]], intake: Intake
) -> Sequence[CandidateSet]:
    kept = array("Q")
    for number, prompt in enumerate(prompts):
        try:
            for check in checks:
                check(prompt)
        except RecordError as error:
            intake(error)
        else:
            kept.append(number)
    return View(prompts, kept)


def _reading(config: SampleConfig | ScoreConfig) -> dict[str, Any]:
    """How rows are read, where that is not as it always was: outputs of earlier runs stay finished."""
    told = {"skip_invalid": config.skip_invalid, "ignore_columns": config.ignore_columns}
    return {name: value for name, value in told.items() if value}


def _left_out(intake: Intake) -> dict[str, Any]:
    """The count of bad records for manifest and caller; said on stderr."""
    if not intake.errors:
        return {}
    print(f"{len(intake.errors)} bad records left out; the first: {intake.errors[0]}", file=sys.stderr)
    return {"skipped_invalid": len(intake.errors)}


def seeded(policy: Policy, seed: int) -> Policy:
    """A policy whose own seed is not set takes the run's."""
    return dataclasses.replace(policy, sampling=dataclasses.replace(policy.sampling, seed=policy.sampling.seed or seed))


class Answerer:
    """Lets one policy answer batches of prompts. To another process it travels as its settings, and loads there."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.name, self.gpus = policy, policy.name, policy.tensor_parallel_size
        self.engine: Engine = find(ENGINES, policy.engine)(policy)

    def __reduce__(self) -> tuple[type[Answerer], tuple[Policy]]:
        return Answerer, (self.policy,)

    def remember(self, calls: Calls) -> None:
        """Keep each answer that costs a call of its own."""
        if isinstance(self.engine, Remembering):
            self.engine.remember(calls)

    def __call__(self, batch: Batch) -> list[Any]:
        """The responses to each prompt, as JSON."""
        if is_code(self.policy.engine):
            with as_input_error(f"engine {self.policy.engine}"):
                answers = self.engine.generate(batch)
        else:
            answers = self.engine.generate(batch)
        failed = getattr(self.engine, "failed", {})
        return [
            partial([response_to_dict(response) for response in responses], failed.get(prompt.id, []))
            for prompt, responses in zip(batch, answers, strict=True)
        ]


def _sample(prompts: Sequence[CandidateSet], workers: list[Answerer], scale: Scale, ledger: Ledger) -> None:
    def plan(worker: Answerer) -> Plan:
        numbers = worker.engine.batches(prompts)
        return scale.plan(worker, View(numbers, range(len(numbers)), lambda batch: [prompts[i] for i in batch]))

    plans = [plan(worker) for worker in workers]
    workers.clear()  # each goes, with its model, when its plan is done
    run_plans("sampling", plans, ledger)


def _answered(prompts: Sequence[CandidateSet], names: list[str], find: Find) -> Iterator[CandidateSet]:
    """The prompts with their responses in the order of the policies."""
    return (_assemble(prompt, names, find) for prompt in prompts)


def _assemble(prompt: CandidateSet, names: list[str], find: Find) -> CandidateSet:
    responses: list[Response] = []
    for name in names:
        rows = find(name, prompt)
        check = Checker(f"answers of {name} to {prompt.id}", 0)
        responses += merge([parse_response(check, row, f"[{i}]") for i, row in enumerate(rows)])
    return CandidateSet(prompt.id, prompt.prompt, responses, prompt.meta)


def merge(responses: Sequence[Response]) -> list[Response]:
    """Responses with identical texts of one policy as one, at the place of the first, with their count."""
    kept: dict[tuple[str, str, bool, str], Response] = {}
    for response in responses:
        # A cut text is another answer: it gets no end in training.
        key = (response.policy, response.text, response.finished, dumps(response.messages))
        if key in kept:
            kept[key].count += response.count
        else:
            kept[key] = dataclasses.replace(response)
    return list(kept.values())


# --- scoring -----------------------------------------------------------------------------------------------------


def build_scorer(config: ScorerConfig) -> Scorer:
    """The scorer behind a config.

    Raises:
        InputError: unknown kind or options.
    """
    kind: Any = find(SCORERS, config.kind)
    try:
        scorer: Scorer = kind(config.name, **_typed(kind, config))
    except TypeError as error:
        raise InputError(f"scorer {config.name!r}: {str(error).removeprefix(kind.__name__ + '.__init__() ')}") from None
    return Named(scorer, config) if is_code(config.kind) else scorer


class Named:
    """A scorer of the user's own kind; its source and options stand in its fingerprint, beside what it says itself."""

    def __init__(self, scorer: Any, config: ScorerConfig) -> None:
        self.name, self._scorer = config.name, scorer
        self._told = {"kind": config.kind, "options": config.options, "sha256": hash_of(config.kind)}

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """The scorer's own scores.

        Raises:
            InputError: it failed, or gave something that is not one list a record.
        """
        with as_input_error(f"scorer {self.name!r}"):
            found: list[list[float | None]] = self._scorer.score(sets)
        if [len(row) for row in found] != [len(record.responses) for record in sets]:
            raise InputError(f"scorer {self.name!r}: must return a list a record, with a number or None a response")
        return found

    def fingerprint(self) -> dict[str, Any]:
        """Name, options and source, and what the scorer adds."""
        return {**getattr(self._scorer, "fingerprint", dict)(), **self._told}


def _typed(kind: Any, config: ScorerConfig) -> dict[str, Any]:
    """The options, those that a scorer declares as a text, a number or a truth value checked to be one."""
    hints = typing.get_type_hints(kind.__init__)
    plain = {name: hint for name, hint in hints.items() if hint in (str, int, float, bool)}
    where = f"scorer {config.name!r}"
    return {
        name: convert(plain[name], value, f"{where}: {name}") if name in plain else value
        for name, value in config.options.items()
    }


def score(config: ScoreConfig, grader: Callable[[ScorerConfig], Grader] | None = None) -> dict[str, Any]:
    """Let every scorer grade every response; the records come back with their scores added.

    Args:
        config: settings.
        grader: makes who grades for a scorer: :class:`Grader`, or one that holds what it needs already.

    Returns:
        ``{"output", "already_finished", "prompts", "scores", "missing_scores", ...}``.

    Raises:
        InputError: bad settings or records; what was scored stays in the journal.
    """
    if not config.scorers:
        raise InputError("scorers: name at least one")
    if Path(config.input).resolve() == Path(config.output).resolve():
        raise InputError(f"input and output are the same file, {config.input}; name another output")
    intake = Intake(config.skip_invalid, config.ignore_columns)
    graders = [(grader or Grader)(scorer) for scorer in config.scorers]
    sets = functools.cache(lambda: _gradable(Spool(load(config.input, "auto", intake)), graders, intake))
    settings = {
        "input": sha256_of(config.input),
        "scorers": [{"name": each.name, **each.scorer.fingerprint()} for each in graders],
        **_reading(config),
    }
    stage = Stage(
        "score",
        Path(config.input),
        Path(config.output),
        settings,
        config.shard,
        config.overwrite,
        inputs=INPUTS["score"],
        on_error=config.on_error,
        retry_failed=config.retry_failed,
    )
    scale, names = Scale(config.shard, config.runner, config.workers), [each.name for each in graders]
    narrow = {each.name: kind for each in graders if (kind := getattr(each.scorer, "rounding", None)) is not None}
    ties, pairs = Counter[str](), Counter[str]()
    done = stage.run(
        lambda ledger: _score(sets(), graders, scale, ledger),
        lambda find: _watched(_graded(sets(), names, find), narrow, ties, pairs),
        lambda: _left_out(intake),
        sets,
    )
    return done if done["already_finished"] or not narrow else {**done, **_near_ties(narrow, ties, pairs)}


def _watched(
    sets: Iterator[CandidateSet], narrow: Mapping[str, Any], ties: Counter[str], pairs: Counter[str]
) -> Iterator[CandidateSet]:
    """The records as they pass, their pairs of answers counted, and those whose order 16 bits cannot tell."""
    if narrow:
        from rankalign.scorers.reward_model import within_rounding
    for record in sets:
        for name, kind in narrow.items():
            row = [response.scores.get(name) for response in record.responses]
            ties[name] += within_rounding(row, kind)
            pairs[name] += len(row) * (len(row) - 1) // 2
        yield record


def _near_ties(narrow: Mapping[str, Any], ties: Counter[str], pairs: Counter[str]) -> dict[str, Any]:
    """By scorer, the pairs of answers whose order is in digits that 16 bits do not have; said on stderr."""
    for name, kind in narrow.items():
        if ties[name]:
            told = str(kind).removeprefix("torch.")
            print(
                f"scorer {name!r}: {ties[name]} of {pairs[name]} pairs differ by less than {told} tells apart, in "
                "which its layers compute; dtype float32 would tell",
                file=sys.stderr,
            )
    return {"within_rounding": {name: ties[name] for name in narrow}}


class Grader:
    """Lets one scorer grade batches of records. To another process it travels as its settings, and loads there."""

    def __init__(self, config: ScorerConfig) -> None:
        self.config, self.name = config, config.name
        self.scorer = build_scorer(config)

    def __reduce__(self) -> tuple[type[Grader], tuple[ScorerConfig]]:
        return Grader, (self.config,)

    def remember(self, calls: Calls) -> None:
        """Keep each of a judge's replies."""
        if isinstance(self.scorer, Remembering):
            self.scorer.remember(calls)

    def __call__(self, batch: Batch) -> list[Any]:
        """The grades of each record; see :func:`rankalign.scorers.grade`."""
        return [partial(grades, _failures(grades)) for grades in grade(self.scorer, batch)]


def _failures(grades: Any) -> list[dict[str, Any]]:
    """What failed of a judge's calls about one record, that for its criteria among them."""
    told = grades["record"] if isinstance(grades, dict) else {}
    calls = [*told.get("calls", ()), *([told["written"]] if "written" in told else [])]
    return [{"index": number, **call["failed"]} for number, call in enumerate(calls) if "failed" in call]


def _score(sets: Sequence[CandidateSet], graders: list[Grader], scale: Scale, ledger: Ledger) -> None:
    starts = range(0, len(sets), SCORE_BATCH)
    batches = View[Batch](starts, range(len(starts)), lambda start: list(sets[start : start + SCORE_BATCH]))
    plans = [scale.plan(grader, batches) for grader in graders]
    graders.clear()  # as in _sample
    run_plans("scoring", plans, ledger)


def _graded(sets: Sequence[CandidateSet], names: list[str], find: Find) -> Iterator[CandidateSet]:
    """The records with their scores added."""
    for record in sets:
        for name, grades in [(name, find(name, record)) for name in names]:  # all found before the record changes
            attach(record, name, grades)
        yield record


def check_judges(output: str | Path) -> None:
    """Refuse to call a scored file a result where a judge's verdicts could not be read at all.

    Raises:
        InputError: none of a judge's verdicts could be read; the file stays as it is.
    """
    counts = (manifest.read(output) or {}).get("counts", {})
    for key, found in counts.items():
        if key.startswith(JUDGE) and found.get("calls") and not found.get("parsed"):
            none = f"none of its {found['calls']} verdicts could be read (parse rate 0)"
            advice = "try more max_new_tokens, another prompt, mode or model"
            raise InputError(f"scorer {key.removeprefix(JUDGE)!r}: {none}; {output} has them in meta; {advice}")


# --- joining shards ----------------------------------------------------------------------------------------------


def merge_shards(output: str, overwrite: bool = False) -> dict[str, Any]:
    """Join the shards of an output to the very file that one process would have written. The shards stay.

    Returns:
        ``{"output", "already_finished", "shards", "prompts", "responses", ...}``.

    Raises:
        InputError: the shards are not all there, finished and of one run; the message names the one.
    """
    found = collect(Path(output))
    stage = Stage(
        found.stage, found.source, Path(output), found.settings, overwrite=overwrite, inputs=INPUTS[found.stage]
    )
    failed = {"failed": found.failed} if found.failed else {}
    skipped = {"skipped_invalid": found.skipped_invalid} if found.skipped_invalid else {}
    facts = {"shards": found.count, "seconds": found.seconds, **failed, **skipped}
    return stage.run(lambda ledger: None, lambda _: _joined(found), lambda: facts)


def _joined(found: Collected) -> Iterator[CandidateSet]:
    settings, sampled = found.settings, found.stage == "sample"
    names = [entry["name"] for entry in settings["policies" if sampled else "scorers"]]
    intake = Intake(settings.get("skip_invalid", False), settings.get("ignore_columns", ""))
    sets = _prompts(found.source, settings["max_prompts"] if sampled else 0, intake)
    if intake.skip_invalid:  # a template may have refused more of them than the reader
        done = (any((name, record.id) in found.items for name in names) for record in sets)
        sets = View(sets, array("Q", (number for number, there in enumerate(done) if there)))
    there = sum((name, record.id) in found.items for record in sets for name in names)
    if not there == len(found.items) == len(names) * len(sets):
        wrong = sorted({(name, record.id) for name in names for record in sets} ^ found.items.keys())
        raise InputError(
            f"the shards do not add up to the whole: {len(wrong)} items too many or too few ({' '.join(wrong[0])}); "
            "make them again, all with the same version of rankalign, with --overwrite"
        )

    def find(name: str, record: CandidateSet) -> Any:
        return found.items[name, record.id]

    return _answered(sets, names, find) if sampled else _graded(sets, names, find)

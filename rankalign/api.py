"""The front door for Python: ``train``, ``sample``, ``score`` and ``compare``, each one call over files or records.

They are the commands of the same names: what those do, resume and refuse, these do.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

from rankalign.config import SampleConfig, ScoreConfig, ScorerConfig, build
from rankalign.data.load import load
from rankalign.data.records import CandidateSet, Prompt, Response, choose_judge, read, write
from rankalign.engines import Policy
from rankalign.errors import InputError
from rankalign.evaluation.pairwise.scores import Comparison, align, compare_by_score
from rankalign.evaluation.raters.reward import grade
from rankalign.models import load as models
from rankalign.recipes.rollouts import SCORE, ScorerReward, greedy, reward_of, sampler_of, watch_of
from rankalign.scorers.function import FunctionScorer
from rankalign.stages import generation
from rankalign.storage.code import remember
from rankalign.storage.jsonl import write_rows
from rankalign.training.added_tokens import add_tokens
from rankalign.training.arguments import PPOConfig, TrainConfig, parse_settings
from rankalign.training.ilql.trainer import Sample, settings_of, train_ilql
from rankalign.training.old_names import modernise
from rankalign.training.ppo.run import train_ppo
from rankalign.training.run import train as train_rank

Source = str | os.PathLike[str]
Records = Source | Iterable[CandidateSet]
RewardFunction = Callable[..., Any]
Models = str | Policy | Sequence[str | Policy] | Mapping[str, str]
Graders = RewardFunction | str | ScorerConfig | Mapping[str, Any] | Sequence[Any]


def train(
    model: str = "",
    *,
    reward_fn: RewardFunction | str | None = None,
    dataset: Any = None,
    samples: Sequence[Sample] | None = None,
    rewards: Sequence[float] | None = None,
    prompts: Source | Sequence[Any] | None = None,
    eval_prompts: Sequence[Any] | None = None,
    config: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train a model; what is given decides how, as with trlX's ``train``.

    * ``reward_fn``: PPO. Answers to ``prompts`` are sampled and graded (see :mod:`rankalign.training.ppo.trainer`).
    * ``dataset=(samples, rewards)``, or both by name: ILQL (see :mod:`rankalign.training.ilql.trainer`).
    * ``dataset`` a file or records: ranking by ``loss``, or ``method="sft"`` or ``"reward"``.
    * ``samples`` alone: SFT.

    Args:
        model: ``default``, ``tiny``, a folder or a hub id; left out, that of ``config``, or ``default``.
        reward_fn: ``(samples) -> list`` or ``(samples, prompts, outputs, tokenizer, **metadata) -> list`` of numbers,
            lists of numbers (one a token) or None; or ``module:name``, or a reward model's name.
        dataset: texts and their rewards; or a file in any format we read, or a sequence of its rows or of records.
        samples: texts, or pairs of a prompt and the answer to it.
        rewards: one number a sample.
        prompts: texts, chats, dictionaries with ``prompt`` (their other keys are metadata for ``reward_fn``), or a
            file; left out, answers begin at the beginning-of-sequence token.
        eval_prompts: prompts answered greedily by the model before and after PPO; the mean rewards are in the result.
        config: settings of ``rankalign train``, or of ILQL.
        **settings: the same by name; they win over ``config``. ``data`` is another name for ``dataset``; ``loss`` may
            be a function of your own over a :class:`rankalign.losses.ranked.Ranked`, and ``format`` one over a row.

    Returns:
        ``{"output", "steps", "counts", "metrics", "seconds", "already_finished"}``, of which ``output`` is the folder
        of the model; with ``eval_prompts`` also ``eval``: ``{"prompts", "reward_before", "reward_after"}``.

    Raises:
        InputError: nothing to learn from, or two things, or bad settings.
    """
    given = {"model": "default", **(config or {}), **settings, **({"model": model} if model else {})}
    given |= {key: remember(given[key]) for key in ("loss", "format") if callable(given.get(key))}
    if dataset is None and reward_fn is None:
        dataset = given.pop("data", None)
    kinds = [reward_fn is not None, dataset is not None, samples is not None]
    if sum(kinds) != 1 or (rewards is not None and samples is None):
        raise InputError("train takes one of reward_fn, dataset and samples (with rewards for ILQL, without for SFT)")
    if reward_fn is not None:
        return _online(reward_fn, prompts, eval_prompts, given)
    if prompts is not None or eval_prompts is not None:
        raise InputError("prompts and eval_prompts belong to reward_fn: nothing is sampled otherwise")
    if rewards is not None or _is_scored(dataset):
        _only_method("ilql", given)
        pair: Any = dataset if samples is None else (samples, rewards)
        return train_ilql(pair[0], pair[1], settings_of(given))
    if samples is not None:
        _only_method("sft", given)
        return _offline(_sample_records(samples, given["model"]), {"template": "raw", **given, "method": "sft"})
    return _offline(dataset, given)


def _is_scored(dataset: Any) -> bool:
    """Whether this is samples and their rewards, not records."""
    pair = isinstance(dataset, tuple | list) and len(dataset) == 2
    return pair and isinstance(dataset[1], Sequence) and all(isinstance(value, Real) for value in dataset[1])


def _only_method(method: str, given: dict[str, Any]) -> None:
    if given.pop("method", method) != method:
        raise InputError(f"these arguments ask for method {method}; leave method out")


def _parsed(given: Mapping[str, Any]) -> TrainConfig:
    """The settings under their present names; what was renamed is said on stderr, as on the command line."""
    found, notes = modernise(dict(given))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    config = parse_settings(found, "rankalign.train")
    add_tokens(config)
    return config


def _beside(given: Mapping[str, Any], name: str) -> Path:
    """A file beside the run's folder, which starting over empties."""
    folder = Path(str(given.get("output_dir") or f"runs/{given.get('method', 'rrhf')}"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.with_name(f"{folder.name}.{name}.jsonl")


# --- on given answers --------------------------------------------------------------------------------------------


def _offline(dataset: Any, given: dict[str, Any]) -> dict[str, Any]:
    if given.get("method") == "ppo":
        raise InputError("method ppo needs reward_fn, not dataset")
    if not isinstance(dataset, str | os.PathLike):
        path, rows = _beside(given, "data"), list(dataset)
        whole = all(isinstance(row, CandidateSet) for row in rows)
        write(path, rows) if whole else write_rows(path, rows)
        dataset = path
    config = _parsed({**given, "data": str(dataset)})
    return train_rank(config, watch_of)


def _sample_records(samples: Sequence[Sample], model: str) -> list[CandidateSet]:
    """Records of one response; a text alone answers the beginning-of-sequence token."""
    pairs = [[_beginning(model), sample] if isinstance(sample, str) else list(sample) for sample in samples]
    if any(len(pair) != 2 for pair in pairs):
        raise InputError("samples are texts, or pairs of a prompt and the answer to it")
    return [CandidateSet(f"sample-{i}", prompt, [Response(str(text))]) for i, (prompt, text) in enumerate(pairs)]


# --- on a reward -------------------------------------------------------------------------------------------------


def _online(
    reward_fn: RewardFunction | str, prompts: Any, eval_prompts: Sequence[Any] | None, given: dict[str, Any]
) -> dict[str, Any]:
    _only_method("ppo", given)
    given = {"template": "raw", **given, "method": "ppo"}
    if not isinstance(prompts, str | os.PathLike):
        path = _beside(given, "prompts")
        write(path, prompt_records([_beginning(given["model"])] if prompts is None else prompts))
        prompts = path
    scorer = None if isinstance(reward_fn, str) else FunctionScorer(SCORE, reward_fn)
    config = _parsed({**given, "data": str(prompts), "reward": scorer.spec if scorer else reward_fn})
    if not isinstance(config, PPOConfig):
        raise InputError("reward_fn asks for method ppo")
    if scorer:
        scorer.tokenizer = models.load_tokenizer(config.model)
    reward = ScorerReward(scorer) if scorer else reward_of(config)
    result = train_ppo(config, sampler_of(config), reward)
    if not eval_prompts:
        return result
    sets = prompt_records(eval_prompts)
    before, after = (_mean_reward(config, where, reward, sets) for where in (config.model, result["output"]))
    return {**result, "eval": {"prompts": len(sets), "reward_before": before, "reward_after": after}}


def _beginning(model: str) -> str:
    tokenizer = models.load_tokenizer(model)
    return str(tokenizer.bos_token or tokenizer.eos_token)


def prompt_records(prompts: Sequence[Any]) -> list[CandidateSet]:
    """Prompts as records without responses: texts, chats, or dictionaries with ``prompt`` and metadata.

    Raises:
        InputError: a dictionary without ``prompt``, or no prompt at all.
    """
    found = []
    for i, item in enumerate(prompts):
        if isinstance(item, Mapping) and "prompt" not in item:
            raise InputError(f"prompts[{i}]: a dictionary needs the key prompt, found {', '.join(map(str, item))}")
        prompt: Prompt = item["prompt"] if isinstance(item, Mapping) else item
        meta = {key: value for key, value in item.items() if key != "prompt"} if isinstance(item, Mapping) else {}
        found.append(CandidateSet(f"prompt-{i}", prompt, [], meta))
    if not found:
        raise InputError("there are no prompts")
    return found


def _mean_reward(config: PPOConfig, model: str, reward: ScorerReward, sets: Sequence[CandidateSet]) -> float | None:
    """Mean reward of one greedy answer to each prompt that was scored; None where none was."""
    texts = greedy(config.model, config.data_settings, config.max_new_tokens)(
        models.load_policy(model, dtype="float32"), sets
    )
    graded = [replace(s, responses=[Response(text)]) for s, text in zip(sets, texts, strict=True)]
    scores = [sum(s) if isinstance(s, Sequence) else s for s in reward(graded) if s is not None]
    return sum(scores) / len(scores) if scores else None


# --- sampling, scoring, comparing --------------------------------------------------------------------------------


def sample(
    model: Models, prompts: Source | Sequence[Any], *, seed: int = 0, output: Source | None = None, **settings: Any
) -> list[CandidateSet]:
    """Let one model or several answer each prompt.

    Args:
        model: ``default``, ``tiny``, a folder, a hub id or a LoRA adapter; several in a list, or by name in a
            dictionary; or policies with settings of their own.
        prompts: a file in any format we read, or texts, chats, dictionaries with ``prompt`` and metadata, or records
            (whose answers are left out).
        seed: base seed; an answer depends on it, the prompt's id, the policy and its number alone.
        output: a file to keep the records in. The work is then resumable, and done but once: the same call reads the
            file. Prompts that are no file are kept beside it.
        settings: keys of a policy and of sampling, such as ``n=4``, ``temperature=0.7``, ``max_new_tokens=64``,
            ``engine="vllm"``, for every model that is not a policy.

    Returns:
        The records, in the order of the prompts; equal answers of one policy are merged, with their ``count``.

    Raises:
        InputError: bad settings, prompts or models.
    """
    policies = _policies(model, settings)
    with _places(output, prompts, "prompts") as (source, target):
        generation.sample(SampleConfig(str(source), str(target), policies, seed))
        return list(read(target))


def _policies(model: Models, settings: Mapping[str, Any]) -> list[Policy]:
    """Policies from names of models; a folder's own name is that of the policy."""
    if isinstance(model, Mapping):
        named = list(model.items())
    else:
        models = [model] if isinstance(model, str | Policy) else list(model)
        named = [("", each) for each in models]  # type: ignore[misc]
    return [
        each
        if isinstance(each, Policy)
        else build(Policy, {"name": name or Path(each).name, "model": each, **settings}, "rankalign.sample")
        for name, each in named
    ]


def score(
    records: Records, scorer: Graders, *, name: str = "", output: Source | None = None, **options: Any
) -> list[CandidateSet]:
    """Let one scorer or several grade every response.

    Args:
        records: records, or a file in any format we read.
        scorer: a function (see :class:`rankalign.scorers.function.FunctionScorer` for what it may take), the same as
            ``module:name`` or ``file.py:name``, or a reward model's folder or hub id; a mapping with ``name``, ``kind``
            and options, as in the settings of ``rankalign score``; or a list of these.
        name: under which the scores are stored; else the function's name, or ``reward_model``.
        output: a file to keep the records in. The work is then resumable, and done but once. Records that are no file
            are kept beside it.
        options: further options of a scorer that is no mapping.

    Returns:
        The records with the scores added; those given stay as they are.

    Raises:
        InputError: bad settings or records, or the function failed.
    """
    several = isinstance(scorer, Sequence) and not isinstance(scorer, str)
    configs = [_scorer(each, name, options) for each in (scorer if several else [scorer])]  # type: ignore[union-attr]
    with _places(output, records, "records") as (source, target):
        generation.score(ScoreConfig(str(source), str(target), configs))
        return list(read(target))


def _scorer(scorer: Any, name: str, options: Mapping[str, Any]) -> ScorerConfig:
    if isinstance(scorer, ScorerConfig):
        return scorer
    if isinstance(scorer, Mapping):
        return build(ScorerConfig, dict(scorer), "rankalign.score")
    if isinstance(scorer, str) and ":" not in scorer:
        return ScorerConfig(name or "reward_model", "reward_model", {"model": scorer, **options})
    own = scorer.rpartition(":")[2] if isinstance(scorer, str) else getattr(scorer, "__name__", type(scorer).__name__)
    return ScorerConfig(name or own, "function", {"function": scorer, **options})


@contextlib.contextmanager
def _places(output: Source | None, given: Any, what: str) -> Iterator[tuple[Path, Path]]:
    """Where a stage reads and writes: files of ours, in a folder that goes again where nobody wants the output."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()) if output is None else Path(output).parent)
        target = folder / "output.jsonl" if output is None else Path(output)
        source = target.with_name(f"{target.name.removesuffix('.jsonl')}.{what}.jsonl")
        write(source, _records(given))
        yield source, target


def _records(given: Any) -> Iterable[CandidateSet]:
    """Records of a file; or of texts and dictionaries, where they are none yet."""
    if isinstance(given, str | os.PathLike):
        return load(given)
    items = list(given)
    return items if items and all(isinstance(item, CandidateSet) for item in items) else prompt_records(items)


def compare(
    a: Records,
    b: Records,
    judge: str = "",
    *,
    scorer: Graders | None = None,
    names: tuple[str, str] = ("a", "b"),
    tie_delta: float = 0.0,
    seed: int = 0,
) -> Comparison:
    """Two systems on the same prompts: sums of scores, wins, ties and losses, with intervals over prompts.

    Args:
        a: answers of the first system: records, or a file in any format we read.
        b: answers of the second to the same prompts.
        judge: whose scores in the records count; needed where several judges scored.
        scorer: grade now, as :func:`score` would, under the name of ``judge`` where one is given.
        names: what to call the two.
        tie_delta: scores this close are a tie.
        seed: of the bootstrap.

    Returns:
        The comparison: ``systems[0]`` has the figures, ``as_dict()`` is what ``rankalign compare --json`` prints,
        ``table()`` its table.

    Raises:
        InputError: the prompts do not match, or there are no scores.
    """
    first, second = align(*(list(load(each)) if isinstance(each, str | os.PathLike) else list(each) for each in (a, b)))
    if scorer is not None:
        grader = generation.build_scorer(_scorer(scorer, judge, {}))
        first, second, judge = grade(first, grader), grade(second, grader), grader.name
    return compare_by_score(first, second, choose_judge([*first, *second], judge), names, tie_delta, seed)

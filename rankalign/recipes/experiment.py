"""The whole path as one experiment: sample, score, train, answer held-out prompts before and after, compare, report.

Every step is a resumable stage of its own, so a second run does only what is missing.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankalign.config import SampleConfig, ScoreConfig, ScorerConfig, build
from rankalign.data.records import CandidateSet, read
from rankalign.engines import Policy
from rankalign.errors import InputError
from rankalign.evaluation.pairwise.scores import compare_by_score
from rankalign.evaluation.raters.reward import evaluate_reward
from rankalign.evaluation.report.hack import find_hacks
from rankalign.evaluation.report.page import write_report
from rankalign.evaluation.tables import Table, interval
from rankalign.evaluation.texts.lexical import evaluate_lexical
from rankalign.evaluation.texts.perplexity import evaluate_perplexity
from rankalign.models import load as models
from rankalign.models.identity import hashes_of
from rankalign.recipes.contents import contents
from rankalign.recipes.rollouts import watch_of
from rankalign.stages.generation import sample, score
from rankalign.storage import manifest, outputs
from rankalign.storage.files import write_text
from rankalign.storage.jsonl import dumps
from rankalign.storage.sources import is_there, sha256_of
from rankalign.training.arguments import TrainConfig, parse_settings
from rankalign.training.locate import read_by
from rankalign.training.run import train


@dataclass(frozen=True)
class ExperimentConfig:
    """Settings of ``rankalign run``.

    Attributes:
        output: folder of the run.
        prompts: records with the training prompts, and with the answers that ``replay`` policies take.
        heldout: records with the prompts that nothing is trained on.
        policies: who writes the candidates.
        scorers: who grades.
        judge: the scorer to train and compare by.
        model: the model to train, in the place of ``default`` in every policy.
        train: settings of ``rankalign train``.
        answer: how the model answers held-out prompts before and after: a policy's settings.
        seed: seed of sampling and training.
        max_prompts: take the first so many training prompts; 0 takes all.
        overwrite: start over.
    """

    output: str
    prompts: str
    heldout: str
    policies: list[Policy]
    scorers: list[ScorerConfig]
    judge: str
    model: str = "default"
    train: dict[str, Any] = field(default_factory=dict)
    answer: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    max_prompts: int = 0
    overwrite: bool = False


def run(config: ExperimentConfig) -> dict[str, Any]:
    """Run the experiment and leave ``result.json``, ``report.html`` and a manifest in ``config.output``.

    Returns:
        What ``result.json`` holds: reward, perplexity, repetition and length before and after, with intervals.

    Raises:
        InputError: bad settings or data.
    """
    if config.judge not in [scorer.name for scorer in config.scorers]:
        raise InputError(f"judge {config.judge!r} is none of the scorers")
    started, folder = time.time(), Path(config.output)
    # All settings are tried now, not when the candidates are paid for; only then does the run count as begun.
    training_config, identity = _training(config), _identity(config)
    outputs.check_reads(folder / "model", read_by(training_config), config.overwrite)
    if config.overwrite:
        (folder / manifest.CLAIM).unlink(missing_ok=True)
    manifest.claim(folder, identity)
    _announce("1/4 candidates: several policies answer the training prompts, the scorer grades them")
    policies = [dataclasses.replace(p, model=_model(config, p)) for p in config.policies]
    candidates = _answers(config, folder / "candidates.jsonl", config.prompts, policies, config.max_prompts)
    _announce("2/4 before: the start model answers the held-out prompts")
    before = _held_out(config, folder / "before.jsonl", "before", config.model)
    _announce("3/4 training")
    training = train(training_config, watch_of)
    _announce("4/4 after: the trained model answers the held-out prompts")
    after = _held_out(config, folder / "after.jsonl", "after", str(folder / "model"))
    result = measure(config, candidates, before, after)
    result["seconds"] = round(time.time() - started, 1)
    result["training"] = {key: training[key] for key in ("steps", "counts", "seconds")}
    write_text(folder / "result.json", dumps(result) + "\n")
    names = ("candidates.jsonl", "before.jsonl", "after.jsonl", "result.json")
    settings = {**dataclasses.asdict(config), "overwrite": False}  # how a run began is no part of what it is
    inputs = [config.prompts, config.heldout]
    manifest.write(folder, "run", settings, inputs, [folder / name for name in names], metrics=result)
    write_report(folder)  # behind the manifest, which it shows
    return result


def _training(config: ExperimentConfig) -> TrainConfig:
    folder = Path(config.output)
    given = {"model": config.model, "data": str(folder / "candidates.jsonl"), "judge": config.judge}
    own = {"output_dir": str(folder / "model"), "overwrite": config.overwrite}
    return parse_settings({**given, "seed": config.seed, **config.train, **own})


def _identity(config: ExperimentConfig) -> dict[str, Any]:
    """All that the result depends on."""
    own = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("output", "overwrite")}
    for path in (config.prompts, config.heldout):
        if not is_there(path):
            raise InputError(f"{path}: no such file")
    read_by_content = {"prompts_sha256": sha256_of(config.prompts), "heldout_sha256": sha256_of(config.heldout)}
    policies = [dataclasses.replace(policy, model=_model(config, policy)) for policy in config.policies]
    return {**own, **read_by_content, **hashes_of(config.model), **contents(policies, config.scorers)}


def _announce(text: str) -> None:
    print(f"\n== {text}", file=sys.stderr, flush=True)


def _model(config: ExperimentConfig, policy: Policy) -> str:
    return config.model if policy.model == "default" else policy.model


def _answers(
    config: ExperimentConfig, output: Path, prompts: str, policies: list[Policy], max_prompts: int = 0
) -> list[CandidateSet]:
    """Sampled and scored records at ``output``."""
    raw = output.with_name(output.name.replace(".jsonl", ".raw.jsonl"))
    sample(SampleConfig(prompts, str(raw), policies, config.seed, max_prompts, config.overwrite))
    score(ScoreConfig(str(raw), str(output), config.scorers, config.overwrite))
    return list(read(output))


def _held_out(config: ExperimentConfig, output: Path, name: str, model: str) -> list[CandidateSet]:
    policy = build(Policy, {**config.answer, "name": name, "model": model}, "answer")
    return _answers(config, output, config.heldout, [policy])


def measure(
    config: ExperimentConfig, candidates: list[CandidateSet], before: list[CandidateSet], after: list[CandidateSet]
) -> dict[str, Any]:
    """The numbers of ``result.json``, all of them from records on disk."""
    comparison = compare_by_score(after, before, config.judge, ("after", "before"), seed=config.seed)
    gain, pool = comparison.systems[0], evaluate_reward(candidates, config.judge, seed=config.seed)
    judge_model = models.load_policy(config.model, dtype="float32")  # the start model, for both sides alike
    tokenizer = models.load_tokenizer(config.model)
    template = config.answer.get("template", "auto")
    rows = {}
    for name, sets in (("before", before), ("after", after)):
        reward, texts = evaluate_reward(sets, config.judge, seed=config.seed), evaluate_lexical(sets)
        surprise = evaluate_perplexity(judge_model, tokenizer, sets, template=template, seed=config.seed)
        rows[name] = {"reward": reward, "lexical": texts, "perplexity": surprise}
    flags = find_hacks(before, after, config.judge, seed=config.seed)
    result: dict[str, Any] = {
        "reward_before": rows["before"]["reward"].metrics["mean"],
        "reward_after": rows["after"]["reward"].metrics["mean"],
        "difference": gain.difference,
        "ci95": list(gain.ci95),
        "n_prompts": gain.n,
        "seed": config.seed,
        "train_mean_reward": pool.metrics["mean"],
        "train_max_reward": pool.metrics["max"],
        "win": gain.win,
        "tie": gain.tie,
        "loss": gain.loss,
        "flags": [{"name": flag.name, "message": flag.message} for flag in flags],
    }
    for name, found in rows.items():
        result |= _columns(name, found)
    # Not among its `tables`: the report has these figures from the records themselves, and shows each once.
    return {**result, "summary": dataclasses.asdict(before_after_table(rows, result))}


def _columns(name: str, found: dict[str, Any]) -> dict[str, float | None]:
    texts = found["lexical"].metrics
    return {
        f"perplexity_{name}": found["perplexity"].metrics["perplexity"],
        f"repetition_{name}": texts["repetition"],
        f"length_{name}": texts["words"],
        f"distinct_2_{name}": texts.get("distinct_2"),  # where every answer is a single word, it has no pairs
        f"copying_{name}": texts["copying"],
    }


def before_after_table(rows: dict[str, dict[str, Any]], result: dict[str, Any]) -> Table:
    """Held-out answers before and after, and the training candidates' reward beside them."""
    shown = [
        ("reward", "reward", "mean"),
        ("length, words", "lexical", "words"),
        ("repeated 3-grams", "lexical", "repetition"),
        ("thoughts, words", "lexical", "thought_words"),
        ("repeated 3-grams in thoughts", "lexical", "thought_repetition"),
        ("distinct 2-grams", "lexical", "distinct_2"),
        ("copied from the prompt", "lexical", "copying"),
        ("perplexity, start model", "perplexity", "perplexity"),
    ]
    table = Table("Held-out prompts", ["", "before", "95 %", "after", "95 %"])
    for label, part, metric in shown:
        if metric.startswith("thought") and not any(metric in row[part].metrics for row in rows.values()):
            continue  # only models that think have these
        cells: list[Any] = [label]
        for name in ("before", "after"):
            found = rows[name][part]
            cells += [found.metrics.get(metric), interval(found.ci95.get(metric))]
        table.rows.append(cells)
    table.note = (
        f"reward after minus before: {result['difference']:+.3f} {interval(result['ci95'])} over "
        f"{result['n_prompts']} prompts (95 % bootstrap over prompts); "
        f"won {result['win']}, tied {result['tie']}, lost {result['loss']}. "
        f"Training candidates: mean reward {result['train_mean_reward']:.3f}, "
        f"mean of each prompt's best {result['train_max_reward']:.3f}."
    )
    return table

"""One unit of the table: a row with a seed samples, trains, answers held-out prompts and is measured on its own.

One that was interrupted goes on with its last stage; training alone starts over, so that its time and memory are those
of a whole run.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rankalign.config import SampleConfig, ScoreConfig, ScorerConfig, build
from rankalign.data.records import CandidateSet, Response, read, to_dict, write
from rankalign.engines import Policy
from rankalign.engines.settings import policy_settings
from rankalign.errors import InputError
from rankalign.evaluation.raters.reward import evaluate_reward
from rankalign.evaluation.texts.divergence import evaluate_divergence
from rankalign.evaluation.texts.lexical import evaluate_lexical
from rankalign.evaluation.texts.perplexity import evaluate_perplexity
from rankalign.models import load as models
from rankalign.models.identity import hashes_of
from rankalign.recipes.paper.child import Inherited, Lock, run_metered
from rankalign.recipes.paper.claims import divergence_bound
from rankalign.recipes.paper.costs import Cost, add_ppo, add_rounds, add_sampling, add_training, models_in_memory
from rankalign.recipes.paper.settings import JUDGE, Row, TableConfig
from rankalign.stages.generation import build_scorer, sample, score
from rankalign.storage import manifest
from rankalign.storage.files import read_text, write_text
from rankalign.storage.journal import content_digest
from rankalign.storage.jsonl import dumps, loads
from rankalign.storage.sources import sha256_of
from rankalign.training.arguments import PPOConfig, parse_settings

ANSWER = "answer"
ANSWERS = "answers.jsonl"
Pool = dict[str, list[float]]
"""Of a row's training candidates, by ``mean`` and ``max``, a figure for each prompt; empty where they are not fixed."""


class Bench:
    """What the units of a table share: settings, the start model, and the policies' answers, sampled once a seed."""

    def __init__(self, config: TableConfig, lock: Lock | Inherited) -> None:
        self.config, self.lock, self.folder = config, lock, Path(config.output)
        self.policies = {p.name: dataclasses.replace(p, model=self._model(p)) for p in config.policies}
        self.scorer = ScorerConfig(JUDGE, "function", {"function": config.reward})
        self.weights = list(hashes_of(config.model).values())
        self._described: dict[str, dict[str, Any]] = {}
        self.graded_by = build_scorer(self.scorer).fingerprint()  # the code behind the name, too
        self.prompts = self.folder / "prompts.jsonl"
        sets = list(read(config.prompts))
        self.sets = sets[: config.max_prompts] if config.max_prompts else sets
        self.prompts_digest = content_digest([to_dict(record) for record in self.sets])

    def begin(self) -> None:
        """Write the prompts that all units share."""
        write(self.prompts, self.sets)

    def _model(self, policy: Policy) -> str:
        return self.config.model if policy.model == "default" else policy.model

    def described(self, name: str) -> dict[str, Any]:
        """What a policy's answers depend on, hashed once for all units."""
        if name not in self._described:
            self._described[name] = policy_settings(self.policies[name])
        return self._described[name]

    @cached_property
    def start(self) -> Any:
        """The start model in float32."""
        return models.load_policy(self.config.model, dtype="float32")

    @cached_property
    def tokenizer(self) -> Any:
        """The start model's tokenizer."""
        return models.load_tokenizer(self.config.model)

    def answered(
        self, output: Path, prompts: str | Path, policy: Policy, seed: int, most: int = 0
    ) -> tuple[list[CandidateSet], float]:
        """Answers of one policy, scored, and the seconds that sampling and scoring took when they were made."""
        raw = output.with_suffix(".raw.jsonl")
        sample(SampleConfig(str(prompts), str(raw), [policy], seed, most))
        score(ScoreConfig(str(raw), str(output), [self.scorer]))
        seconds = sum((manifest.read(path) or {})["seconds"] for path in (raw, output))
        return list(read(output)), seconds


@dataclass
class Unit:
    """One row with one seed, in a folder of its own."""

    bench: Bench
    row: Row
    seed: int

    @property
    def folder(self) -> Path:
        """``output/seed-SEED/ROW``."""
        return self.bench.folder / f"seed-{self.seed}" / self.row.name

    def run(self) -> bool:
        """Do whatever is missing; False if nothing was."""
        settings = self.settings()
        if manifest.is_finished(self.folder, settings):
            shutil.rmtree(self.work, ignore_errors=True)  # a kill can fall between the manifest and this
            return False
        print(f"\n== seed {self.seed}: {self.row.title}", file=sys.stderr, flush=True)
        manifest.claim(self.folder, settings)
        cost, pool, model = self.made(settings)
        if self.row.kind != "best_of":
            self.answer(model)
        sets = self.held_out()
        unit: dict[str, Any] = {"cost": dataclasses.asdict(cost), "pool": pool, "held": self.measures(sets, model)}
        unit["threads"] = torch.get_num_threads()  # that the time was taken with
        write_text(self.folder / "unit.json", dumps(unit) + "\n")
        inputs = [str(self.bench.prompts), self.bench.config.heldout]
        date = time.strftime("%Y-%m-%d", time.gmtime())
        outputs = [p for p in sorted(self.folder.iterdir()) if p.suffix == ".jsonl" or p.name == "unit.json"]
        manifest.write(self.folder, "table row", settings, inputs, outputs, date=date, cost=unit["cost"])
        shutil.rmtree(self.work, ignore_errors=True)  # a model a unit would fill the disk
        return True

    def settings(self) -> dict[str, Any]:
        """All that the unit depends on."""
        bench, config = self.bench, self.bench.config
        row = {key: value for key, value in dataclasses.asdict(self.row).items() if key != "title"}
        shared = {name: getattr(config, name) for name in ("reward", "answer", "max_heldout", "model")}
        shared["train"] = config.train if self.row.kind in ("train", "iterate") else {}
        shared["graded_by"] = bench.graded_by
        hashes = {"prompts": bench.prompts_digest, "heldout": sha256_of(config.heldout)}
        policies = [bench.described(name) for name in self.row.policies]
        return {"seed": self.seed, "row": row, "policies": policies, "weights": bench.weights, **shared, **hashes}

    def check(self) -> None:
        """Refuse a table of two minds before anything of it is run.

        Raises:
            InputError: the unit was made, or begun, under other settings.
        """
        settings = self.settings()
        if not manifest.is_finished(self.folder, settings) and (self.folder / manifest.CLAIM).exists():
            manifest.claim(self.folder, settings)

    def models(self) -> int:
        """Language models that its training holds at once, by its settings."""
        if self.row.kind in ("start", "best_of"):
            return 1
        content = self.train_settings()
        content |= {"reward": self.bench.config.reward} if content.get("method") == "ppo" else {"judge": JUDGE}
        online = self.row.iterate if self.row.iterate.get("refresh_every") else None
        return models_in_memory(parse_settings(content), self.bench.start, online)

    # --- training ---------------------------------------------------------------------------------------------------

    @property
    def work(self) -> Path:
        """What training leaves: models and checkpoints. It goes when the unit is finished."""
        return self.folder / "work"

    def made(self, settings: dict[str, Any]) -> tuple[Cost, Pool, str]:
        """The row's model: what it took, the candidates' mean and best reward a prompt, and where it is."""
        if self.row.kind in ("start", "best_of"):
            return Cost(), {}, self.bench.config.model
        if self.row.kind == "iterate":
            return self.iterated(settings)
        content = self.train_settings()
        return self.with_ppo(content, settings) if content.get("method") == "ppo" else self.ranked(content, settings)

    def train_settings(self) -> dict[str, Any]:
        """Of this row: the shared ones, then its own."""
        config = self.bench.config
        content = {"model": config.model, "seed": self.seed} | config.train | self.row.train
        if content.get("method") == "ppo":
            content.pop("save_strategy", None)  # of the other rows; PPO keeps its state by --save_steps alone
        return content

    def ranked(self, content: dict[str, Any], settings: dict[str, Any]) -> tuple[Cost, Pool, str]:
        """Candidates, one set for all rows of a seed, and training on them."""
        sets, cost = self.candidates()
        data, output = self.folder / "candidates.jsonl", self.work / "model"
        write(data, sets)
        content |= {"data": str(data), "judge": JUDGE, "output_dir": str(output)}
        told = self.train("train", content, settings, cost)
        add_training(cost, parse_settings(content), told["metrics"]["epoch"], sets, self.bench.tokenizer)
        rows = evaluate_reward(sets, JUDGE).rows
        return cost, {name: [row[name] for row in rows] for name in ("mean", "max")}, str(output)

    def candidates(self) -> tuple[list[CandidateSet], Cost]:
        """The answers of the row's policies prompt by prompt, and what they took."""
        cost = Cost()
        parts = [self.pooled(name, cost)[0] for name in self.row.policies]
        joined = [
            dataclasses.replace(of[0], responses=[r for one in of for r in one.responses])
            for of in zip(*parts, strict=True)
        ]
        return joined, cost

    def pooled(self, name: str, cost: Cost) -> tuple[list[CandidateSet], Path]:
        """The start model's answers as one policy, sampled once a seed for all rows; each row pays for them."""
        policy = self.bench.policies[name]
        path = self.bench.folder / f"seed-{self.seed}" / "pool" / f"{name}.jsonl"
        sets, seconds = self.bench.answered(path, self.bench.prompts, policy, self.seed)
        cost.seconds += seconds
        add_sampling(cost, policy, sets, self.bench.tokenizer)
        return sets, path

    def with_ppo(self, content: dict[str, Any], settings: dict[str, Any]) -> tuple[Cost, Pool, str]:
        """PPO on the prompts with the same reward function."""
        cost, output, prompts = Cost(), self.work / "model", self.bench.prompts
        content |= {"reward": self.bench.config.reward, "data": str(prompts), "output_dir": str(output)}
        self.train("train", content, settings, cost)
        parsed: Any = parse_settings(content)
        if not isinstance(parsed, PPOConfig):
            raise TypeError(parsed)  # never: it tells the type checker what parse_settings makes of method ppo
        add_ppo(cost, parsed, output / "log.jsonl", list(read(prompts)), self.bench.tokenizer)
        return cost, {}, str(output)

    def iterated(self, settings: dict[str, Any]) -> tuple[Cost, Pool, str]:
        """Sampling from the model that is being trained; the data set's answers stay what they are."""
        config, cost = self.bench.config, Cost()
        policies = [self.current(name, cost) for name in self.row.policies]
        content = {
            "output": str(self.work),
            "prompts": str(self.bench.prompts),
            "policies": [dataclasses.asdict(policy) for policy in policies],
            "scorers": [{"name": JUDGE, "kind": "function", "function": config.reward}],
            "judge": JUDGE,
            "model": config.model,
            "train": config.train | self.row.train,
            "seed": self.seed,
            **self.row.iterate,
        }
        told = self.train("iterate", content, settings, cost)
        rounds = [list(read(self.work / f"round-{one['round']}" / "candidates.jsonl")) for one in told["rounds"]]
        add_rounds(cost, content, policies, rounds, self.bench.tokenizer)
        return cost, {}, str(told["model"])

    def current(self, name: str, cost: Cost) -> Policy:
        """A policy that samples with the weights of the moment, or replays what the start model once wrote as it."""
        if name not in self.bench.config.dataset:
            return dataclasses.replace(self.bench.policies[name], model="default")
        return Policy(name, engine="replay", file=str(self.pooled(name, cost)[1]), only=name)

    def train(self, command: str, content: dict[str, Any], settings: dict[str, Any], cost: Cost) -> dict[str, Any]:
        """Run a command in a process of its own, unless that was done; its result. Time and peak go into ``cost``."""
        done = self.folder / "trained.json"
        told = loads(read_text(done)) if done.exists() else {}
        # The result names a model that must be there.
        if told.get("settings") != loads(dumps(settings)) or not self.work.exists():
            shutil.rmtree(self.work, ignore_errors=True)
            result, took = run_metered(self.folder, command, content, self.bench.lock)
            told = {"settings": settings, "result": result, "took": took}
            write_text(done, dumps(told) + "\n")
        cost.seconds += told["took"]["seconds"]
        cost.peak_bytes = told["took"]["peak_bytes"]
        return dict(told["result"])

    # --- held-out prompts -------------------------------------------------------------------------------------------

    def answer(self, model: str) -> None:
        """Answer the held-out prompts with the model. Draws depend on the policy's name: all rows share one, and with
        it the random numbers, so that rows differ by their models alone."""
        config = self.bench.config
        policy = build(Policy, {"temperature": 1.0, **config.answer, "name": ANSWER, "model": model}, "answer")
        self.bench.answered(self.folder / ANSWERS, config.heldout, policy, self.seed, config.max_heldout)

    @property
    def answering(self) -> Unit:
        """The unit whose answers it takes: of best-of-n the start model's, else itself."""
        if self.row.kind != "best_of":
            return self
        return Unit(self.bench, next(row for row in self.bench.config.rows if row.kind == "start"), self.seed)

    def held_out(self, name: str = ANSWERS) -> list[CandidateSet]:
        """Its answers to the held-out prompts, in a file of that name; of best-of-n the one with the most reward."""
        sets = list(read(self.answering.folder / name))
        if self.row.kind != "best_of":
            return sets
        return [dataclasses.replace(record, responses=[_best(record)]) for record in sets]

    def measures(self, sets: list[CandidateSet], model: str) -> dict[str, list[float]]:
        """By name, a figure for each held-out prompt: see :class:`rankalign.recipes.paper.claims.Results`."""
        reward, texts = evaluate_reward(sets, JUDGE).rows, evaluate_lexical(sets).rows
        if any("mean" not in row for row in reward):
            raise InputError(f"row {self.row.name!r}: the reward function left held-out answers without a score")
        template = self.bench.config.answer.get("template", "auto")
        nats, tokens = dict.fromkeys((s.id for s in sets), 0.0), dict.fromkeys((s.id for s in sets), 0.0)
        for row in evaluate_perplexity(self.bench.start, self.bench.tokenizer, sets, template=template).rows:
            nats[row["id"]] += row["nats"]
            tokens[row["id"]] += row["tokens"]
        columns = {"reward": [row["mean"] for row in reward], "nats": [*nats.values()], "tokens": [*tokens.values()]}
        columns |= {name: [row[name] for row in texts] for name in ("repetition", "words")}
        return columns | {"kl": self.divergence(sets, model)}

    def divergence(self, sets: list[CandidateSet], model: str) -> list[float]:
        """KL to the start model, nats an answer: estimated on the draws; of best-of-n, its upper bound."""
        if self.row.kind == "start":
            return [0.0] * len(sets)
        if self.row.kind == "best_of":
            return [divergence_bound(self.bench.config.answer.get("n", 1))] * len(sets)
        policy, template = models.load_policy(model, dtype="float32"), self.bench.config.answer.get("template", "auto")
        found = evaluate_divergence(policy, self.bench.start, self.bench.tokenizer, sets, template=template)
        by_id = {row["id"]: row["kl"] for row in found.rows}
        return [by_id.get(record.id, 0.0) for record in sets]  # an answer without a token says nothing


def _best(record: CandidateSet) -> Response:
    """The response with the highest score, drawn once."""
    scores = [-math.inf if score is None else score for score in record.scores(JUDGE)]
    return dataclasses.replace(record.responses[scores.index(max(scores))], count=1)

"""PPO on language models, in one loop: sample answers, grade them, shape rewards, estimate advantages, update.

After Ziegler et al. 2019 (arXiv:1909.08593) and Schulman et al. 2017 (arXiv:1707.06347). Who samples and who grades is
handed in. All draws are pure functions of seed, prompt and step, so a checkpoint holds no random state.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Trainer, get_scheduler

from rankalign.data.records import LARGEST_SCORE, CandidateSet, Response
from rankalign.errors import InputError
from rankalign.training import processes
from rankalign.training.arguments import PPOConfig
from rankalign.training.ppo import launched
from rankalign.training.ppo import math as ppo_math
from rankalign.training.ppo import state as ppo_state
from rankalign.training.ppo.math import Score
from rankalign.training.ppo.rollouts import (
    LARGEST_REWARD,
    Answer,
    Means,
    Question,
    Reward,
    Rollouts,
    Sampler,
    Seen,
    check_size,
)
from rankalign.training.ppo.value import ActorCritic, Reference


class PPOTrainer:
    """Trains an actor-critic on rewards. A step is one iteration: ``rollouts`` answers, ``ppo_epochs`` over them.

    Args:
        actor: policy and critic, without dropout.
        questions: prompts, drawn in an order that is shuffled anew each time all have been used.
        config: settings.
        sampler: writes answers with the policy.
        reward: grades them.
        tokenizer: fingerprint of the policy's tokenizer.

    Attributes:
        history: a line of metrics for each step so far.
    """

    def __init__(
        self,
        actor: ActorCritic,
        questions: Sequence[Question],
        config: PPOConfig,
        sampler: Sampler,
        reward: Reward,
        tokenizer: str = "",
    ) -> None:
        self.actor, self.questions, self.config, self.tokenizer = actor, questions, config, tokenizer
        self.sampler, self.reward = sampler, reward
        self.accelerator = launched.accelerator(config)
        self.reference = Reference(actor, spread=processes.spreads_weights(config))
        self.kl = ppo_math.KLController(config.kl_coef, config.kl_target, config.kl_horizon)
        self.moments = ppo_math.RunningMoments()
        self.history: list[dict[str, Any]] = []
        self._started, self._before_checkpoint = time.time(), 0.0
        if config.rollouts % self._world:
            raise InputError(f"--rollouts {config.rollouts} cannot be shared by {self._world} processes")
        self.baseline = self._baseline() if config.reward_baseline else None
        self._set_up()

    def seconds(self) -> float:
        """What the run took, earlier processes up to the checkpoint that this one goes on from included."""
        return self._before_checkpoint + time.time() - self._started

    def _set_up(self) -> None:
        """The optimiser over all that trains, and a schedule that moves with every update."""
        config = self.config
        parameters = list(ppo_state.trainable(self.actor).values())
        if launched.by_shards(self.accelerator):
            launched.prove(self.actor, self.questions[0].tokens)
        make, keywords = Trainer.get_optimizer_cls_and_kwargs(config)
        optimizer = make(parameters, **{"weight_decay": config.weight_decay, **keywords})
        self.optimizer = optimizer
        batches = math.ceil(config.rollouts // self._world / self._batch_size)
        total = self.steps * config.ppo_epochs * batches
        self.schedule = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=config.get_warmup_steps(total),
            num_training_steps=total,
            scheduler_specific_kwargs=cast(dict[str, Any], config.lr_scheduler_kwargs),
        )
        self.model, self._stepper = self.accelerator.prepare(self.actor, optimizer)
        self.parameters = list(ppo_state.trainable(self.actor).values())  # which sharding has put others in place of
        self.reference.wrapped(processes.layers_in(self.accelerator))
        if self._world > 1:
            print(processes.describe(self.accelerator.distributed_type, self.model), file=sys.stderr)

    @property
    def _world(self) -> int:
        return self.accelerator.num_processes

    @property
    def _batch_size(self) -> int:
        """Answers of one process in an update."""
        return self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps

    @property
    def step(self) -> int:
        """How many steps are done."""
        return len(self.history)

    @property
    def steps(self) -> int:
        """How many there are to be: ``max_steps``, or what ``num_train_epochs`` passes over the prompts take."""
        epochs = math.ceil(self.config.num_train_epochs * len(self.questions) / self.config.rollouts)
        return self.config.max_steps if self.config.max_steps > 0 else epochs

    def iterate(self) -> dict[str, Any]:
        """One step; returns its line of ``history``."""
        self.actor.eval()
        rollouts, line = self._collect()
        line = {"step": self.step + 1, **line, "learning_rate": self.schedule.get_last_lr()[0]}
        line |= self._update(rollouts)
        self.kl.update(line["kl"], self.config.rollouts)
        self.history.append(line)
        return line

    # --- rollouts -----------------------------------------------------------------------------------------------

    def draws(self, step: int) -> list[tuple[Question, int]]:
        """The questions of a step, of all processes, each with the number of its draw in the whole run."""
        first, size = step * self.config.rollouts, len(self.questions)
        found = []
        for number in range(first, first + self.config.rollouts):
            order = _shuffled(size, self.config.seed, number // size)
            found.append((self.questions[order[number % size]], number))
        return found

    def _answered(self, draws: Sequence[tuple[Question, int]]) -> list[Seen]:
        """What this process draws, grades and measures of a step."""
        prompts = [question.tokens for question, _ in draws]
        # On a GPU in 16 bits too, for half the cache and faster products; on a CPU runs keep their bits.
        on_gpu = self.accelerator.device.type == "cuda"
        with self.accelerator.autocast() if on_gpu else contextlib.nullcontext(), self.reference.trained() as policy:
            answers = self.sampler(policy, prompts, [(q.record.id, number) for q, number in draws])
        with processes.whole_weights(self.config):  # of models that grade
            raw = self.reward([self._as_record(q, a) for (q, _), a in zip(draws, answers, strict=True)])
        responses = [answer.ids for answer in answers]
        flat = self._before(prompts, responses)
        # To other processes tensors go by way of the CPU.
        columns = (torch.cat(p).cpu() if self._world > 1 else torch.cat(p) for p in zip(*flat, strict=True))
        rows = [torch.split(column, [len(ids) for ids in responses]) for column in columns]
        return [Seen(*one) for one in zip(answers, raw, *rows, strict=True)]

    def _collect(self) -> tuple[Rollouts, dict[str, Any]]:
        """The answers of a step, those of all processes in each of them, so that all that follows, whitening, scales
        and the order of the updates among it, is computed as one process computes it."""
        draws = self.draws(self.step)
        seen, device = processes.together(self._answered(processes.share(draws))), self.accelerator.device
        questions, answers, raw = [q for q, _ in draws], [s.answer for s in seen], [s.score for s in seen]
        scores = self._scaled(raw, questions)
        prompts, responses = [q.tokens for q in questions], [answer.ids for answer in answers]
        written = ppo_math.length_mask([len(r) for r in responses], device=device)
        mask = written & torch.tensor([score is not None for score in raw], device=device)[:, None]
        columns = ([s.logps for s in seen], [s.values for s in seen], [s.refs for s in seen])
        logps, values, refs = (ppo_math.unflatten(torch.cat(column).to(device), written) for column in columns)
        kl = ppo_math.kl_per_token(logps, refs, self.config.kl_estimator)
        rewards = ppo_math.shape_rewards(ppo_math.place_scores(scores, written), kl, mask, self.kl.coef)
        advantages, returns = ppo_math.gae(rewards, values, mask, self.config.gamma, self.config.gae_lambda)
        white = ppo_math.masked_whiten(advantages, mask)
        rollouts = Rollouts(prompts, responses, written, mask, logps, values, white, returns)
        return rollouts, self._describe(rollouts, refs, raw, scores, answers)

    def _as_record(self, question: Question, answer: Answer) -> CandidateSet:
        tokens = {"tokenizer": self.tokenizer, "ids": answer.ids}
        response = Response(answer.text, "ppo", answer.finished, tokens=tokens)
        return CandidateSet(question.record.id, question.record.prompt, [response], question.record.meta)

    def _parts(self, count: int) -> Iterator[tuple[int, int]]:
        """Start and size of the micro-batches of the first epoch."""
        size = self.config.per_device_train_batch_size
        return ((start, size) for start in range(0, count, size))

    @torch.no_grad()
    def _before(self, prompts: list[list[int]], responses: list[list[int]]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Log-probabilities, values and the start model's log-probabilities, micro-batch by micro-batch."""
        parts = [(prompts[i : i + n], responses[i : i + n]) for i, n in self._parts(len(prompts))]
        with launched.mixed(self.accelerator):
            own = [self.model(*part) for part in parts]
        with self.reference.policy() as policy, self.accelerator.autocast():
            refs = [self.reference.logps(policy, *part) for part in parts]
        return [(logps, values, ref) for (logps, values), ref in zip(own, refs, strict=True)]

    def _scaled(self, raw: Sequence[Score | None], questions: Sequence[Question]) -> list[Score]:
        """Scores as rewards: less the baseline, scaled, clipped; 0 for a missing one, whose tokens are masked."""
        kind, missing = self.config.scale_rewards, [score is None for score in raw]
        scores: list[Score] = [0.0 if score is None else score for score in raw]
        check_size(scores, questions, LARGEST_SCORE, "sums and squares overflow")
        if self.baseline is not None:
            scores = ppo_math.reference_normalised(scores, [q.record.id for q in questions], self.baseline)
        totals = [ppo_math.total(s) for s, none in zip(scores, missing, strict=True) if not none]
        if not totals:
            raise InputError("the scorer gave no answer of this step a score")
        if kind != "ref" or not self.moments.count:
            self.moments.update(totals)
        limit = self.config.clip_reward
        scaled = [ppo_math.clipped(self.moments.scaled(score, kind), limit) for score in scores]
        check_size(scaled, questions, LARGEST_REWARD, "float32 has no squares; set --scale_rewards or --clip_reward")
        return [0.0 if none else score for score, none in zip(scaled, missing, strict=True)]

    def _baseline(self) -> dict[str, float]:
        """Score of each prompt's answer by the baseline's policy, by prompt id (never by text)."""
        name = self.config.reward_baseline
        chosen = [
            CandidateSet(q.record.id, q.record.prompt, [answer], q.record.meta)
            for q in self.questions
            if (answer := next((r for r in q.record.responses if r.policy == name), None)) is not None
        ]
        if len(chosen) < len(self.questions):
            missing = len(self.questions) - len(chosen)
            raise InputError(f"--reward_baseline {name}: {missing} prompts have no response of that policy")
        with processes.whole_weights(self.config):
            scores = processes.together(list(self.reward(processes.share(chosen))))
        return {s.id: ppo_math.total(score) for s, score in zip(chosen, scores, strict=True) if score is not None}

    def _describe(
        self, r: Rollouts, refs: Tensor, raw: Sequence[Score | None], scores: Sequence[Score], answers: list[Answer]
    ) -> dict[str, Any]:
        """What the log says of the rollouts; KL and lengths are means over answers, entropy over tokens."""
        scored, means = r.mask.any(1), Means()
        numbers = torch.tensor([0.0 if s is None else ppo_math.total(s) for s in raw]).to(refs.device, torch.float64)
        used = torch.tensor([ppo_math.total(s) for s in scores]).to(refs.device)
        sums = {k: (ppo_math.kl_per_token(r.logps, refs, k) * r.mask).sum(1) for k in ("k1", "k3")}
        means.add(
            scored, reward=numbers, reward_squared=numbers**2, scaled_reward=used, kl=sums["k1"], kl_k3=sums["k3"]
        )
        finished = torch.tensor([float(answer.finished) for answer in answers], device=refs.device)
        means.add(torch.ones_like(scored), scored=scored, finished=finished, response_tokens=r.written.sum(1))
        means.add(r.mask, entropy=-r.logps)  # the mean of -log p over draws from p
        explained = ppo_math.explained_variance(r.values, r.returns, r.mask)
        means.add(torch.ones_like(explained).bool(), explained_variance=explained)
        line = means.read()
        line["reward_std"] = math.sqrt(max(line.pop("reward_squared") - line["reward"] ** 2, 0.0))
        return {**line, "kl_coef": self.kl.coef}

    # --- updates ------------------------------------------------------------------------------------------------

    def _update(self, rollouts: Rollouts) -> dict[str, float]:
        """All epochs over the rollouts. The first goes through them as they were scored: its first update sees the
        very rows whose log-probabilities are known, and the ratio is exactly 1."""
        if self.config.gradient_checkpointing:
            self.actor.train()  # transformers checkpoints only then; there is no dropout that could awake
        means, count, size = Means(), len(rollouts.prompts), self._batch_size * self._world
        for epoch in range(self.config.ppo_epochs):
            mixed = _shuffled(count, self.config.seed, self.step, epoch)
            order = mixed if epoch else list(range(count))
            for start in range(0, count, size):
                self._train_on(rollouts, order[start : start + size], means)
        return means.read(self.accelerator)

    def _train_on(self, rollouts: Rollouts, batch: list[int], means: Means) -> None:
        """One update: a mean over the tokens of the batch, which the processes share out in micro-batches."""
        tokens, own = rollouts.mask[batch].sum(), processes.share(batch)
        parts = [own[start : start + size] for start, size in self._parts(len(own))]
        for part in parts:
            with launched.part(self.accelerator, self.model, last=part is parts[-1]) as backward:
                # DDP takes the mean over ranks
                backward(self._loss(rollouts, part, means) * self._world / tokens.clamp(min=1))
        # Measured also where 0 asks for no limit.
        norm = launched.clip(self.accelerator, self.parameters, self.config.max_grad_norm or math.inf)
        if not torch.isfinite(norm):
            raise InputError(f"step {self.step + 1}: the gradient is not finite; lower --learning_rate")
        means.add(torch.ones_like(norm).bool(), grad_norm=norm)
        self._stepper.step()
        self.schedule.step()
        self._stepper.zero_grad()

    def _loss(self, rollouts: Rollouts, rows: list[int], means: Means) -> Tensor:
        """Sum over the tokens of some rollouts."""
        config, mask = self.config, rollouts.mask[rows]
        with launched.mixed(self.accelerator):
            flat = self.model([rollouts.prompts[i] for i in rows], [rollouts.responses[i] for i in rows])
        logps, values = (ppo_math.unflatten(part, rollouts.written[rows]) for part in flat)
        old_logps, old_values = rollouts.logps[rows], rollouts.values[rows]
        policy, cut = ppo_math.policy_loss(logps, old_logps, rollouts.advantages[rows], config.clip_range)
        value, value_cut = ppo_math.value_loss(values, old_values, rollouts.returns[rows], config.value_clip_range)
        moved = ppo_math.kl_per_token(old_logps, logps.detach(), "k3")
        means.add(mask, policy_loss=policy, value_loss=value, clip_fraction=cut, value_clip_fraction=value_cut)
        means.add(mask, update_kl=moved, ratio=(logps.detach() - old_logps).exp())
        return ((policy + config.vf_coef * value) * mask).sum()

    # --- checkpoints --------------------------------------------------------------------------------------------

    def save(self, output: Path, settings: dict[str, Any]) -> None:
        """Write ``output/checkpoint-STEP``."""
        facts = {
            "settings": settings,
            "history": self.history,
            "kl_coef": self.kl.coef,
            "moments": vars(self.moments),
            "schedule": self.schedule.state_dict(),
            "lr": [group["lr"] for group in self.optimizer.param_groups],
            "seconds": self.seconds(),
        }
        folder = output / f"checkpoint-{self.step}"
        if launched.by_shards(self.accelerator):
            launched.save(self.accelerator, folder, facts, self.config.save_total_limit)
        elif self.accelerator.is_main_process:
            ppo_state.save(folder, self.actor, self.optimizer, facts, self.config.save_total_limit)
        self.accelerator.wait_for_everyone()

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        facts = ppo_state.read_facts(folder)
        launched.check_made(self.accelerator, folder, facts)
        if launched.by_shards(self.accelerator):
            launched.load(self.accelerator, folder)
        else:
            ppo_state.load(folder, self.actor, self.optimizer)
        self.history, self.kl.coef = facts["history"], facts["kl_coef"]
        self._before_checkpoint = facts.get("seconds", 0.0)  # absent in those of version 0.1.0
        self.moments = ppo_math.RunningMoments(**facts["moments"])
        self.schedule.load_state_dict(facts["schedule"])
        for group, rate in zip(self.optimizer.param_groups, facts["lr"], strict=True):
            group["lr"] = rate


def _shuffled(count: int, *key: int) -> list[int]:
    """A permutation that depends on nothing but its arguments."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part + 1) % 2**63  # a large prime keeps neighbouring keys apart
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order

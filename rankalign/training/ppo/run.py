"""One PPO run: prompts, actor and critic, steps with checkpoints, and what is left on disk at the end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, set_seed

from rankalign.data import load as data
from rankalign.data.convert import Intake
from rankalign.data.encode import TokenList, said
from rankalign.data.render import Rendering
from rankalign.errors import InputError, Interrupted, RecordError
from rankalign.models import adapters, saving
from rankalign.models import load as models
from rankalign.models.identity import config_of, tokenizer_hash
from rankalign.progress import Progress
from rankalign.rows import logps
from rankalign.storage import manifest, outputs
from rankalign.storage.files import write_text
from rankalign.storage.folders import check_writable, remove_strays
from rankalign.storage.journal import differences
from rankalign.storage.jsonl import dumps, loads, without_nan
from rankalign.storage.sources import is_there, sha256_of
from rankalign.training import processes
from rankalign.training.added_tokens import add_tokens
from rankalign.training.arguments import PPOConfig
from rankalign.training.card import write_card
from rankalign.training.defaults import say
from rankalign.training.fit import check_end, check_fit
from rankalign.training.inputs import choose_kernels, disable_dropout, mixed, say_counts
from rankalign.training.locate import locate, read_by
from rankalign.training.ppo import state as ppo_state
from rankalign.training.ppo.rollouts import Question, Reward, Sampler
from rankalign.training.ppo.trainer import PPOTrainer
from rankalign.training.ppo.value import ActorCritic, load_value_net
from rankalign.training.processes import is_first
from rankalign.training.run import StopOnSignal


def train_ppo(config: PPOConfig, sampler: Sampler, reward: Reward) -> dict[str, Any]:
    """Train as ``config`` says and leave model, critic, ``log.jsonl`` and manifest in ``config.output_dir``.

    Returns:
        ``{"output", "steps", "counts", "metrics", "seconds", "already_finished"}``.

    Raises:
        InputError: bad settings or data.
        Interrupted: stopped by a signal; the same call goes on from the checkpoint.
    """
    reads = read_by(config)
    locate(config)
    add_tokens(config)
    output = Path(str(config.output_dir))
    settings = _settings(config, reward)
    with PartialState().main_process_first():  # one removes it, and the others find it gone
        outputs.begin(output, reads, bool(config.overwrite))
    if manifest.is_finished(output, settings):
        print(f"{output} is finished already with these settings: nothing to do", file=sys.stderr)
        return _summary(output, already_finished=True)
    choose_kernels(config.run_settings)
    if is_first():
        check_writable(output)
    say(config)
    set_seed(config.seed)
    tokenizer = models.load_tokenizer(config.model)
    check_end(tokenizer)
    questions, counts = load_questions(config, tokenizer)
    actor = load_actor(config, questions)
    prompts = [TokenList(question.record.id, question.tokens, [], []) for question in questions]
    check_fit(actor.policy, prompts, more=config.max_new_tokens)
    trainer = PPOTrainer(actor, questions, config, sampler, reward, models.tokenizer_fingerprint(tokenizer))
    print(f"reward: {dumps(settings['reward_sha256'])}", file=sys.stderr)
    _run(trainer, config, output, settings)
    actor.save(output, is_first())  # on all processes, each of which may hold a share
    if is_first():
        tokenizer.save_pretrained(str(output))
        saving.finish(output, None if config.use_lora else models.local_folder(config.model), config.keep_float32)
        facts = {"counts": counts, "metrics": trainer.history[-1], "steps": trainer.step}
        write_card(output, config.method, config.model, config.asked_data, settings, facts)
        made = [p for p in sorted(output.iterdir()) if not p.name.startswith(("checkpoint-", "manifest", "."))]
        manifest.write(output, "train", settings, [config.data], made, **facts, seconds=trainer.seconds())
    trainer.accelerator.wait_for_everyone()
    return _summary(output, already_finished=False)


def _summary(output: Path, already_finished: bool) -> dict[str, Any]:
    facts = manifest.read(output) or {}
    told = {key: facts[key] for key in ("steps", "counts", "metrics", "seconds")}
    return {"output": str(output), **told, "already_finished": already_finished}


def _settings(config: PPOConfig, reward: Reward) -> dict[str, Any]:
    """All that the result depends on, as it reads back from JSON."""
    if not config.data:
        raise InputError("--data is missing: a file of prompts")
    if not is_there(config.data):
        raise InputError(f"{config.data}: no such file")
    named = {name: model for name, model in (("model", config.model), ("value", config.value_model)) if model}
    hashes = {f"{name}_sha256": models.weights_of(model) for name, model in named.items()}
    hashes |= {f"{name}_config_sha256": config_of(model) for name, model in named.items()}
    hashes["tokenizer_sha256"] = tokenizer_hash(config.model)
    found = {**config.own_settings(), "data_sha256": sha256_of(config.data), **hashes}
    return dict(loads(dumps({**found, "reward_sha256": reward.fingerprint()})))


def load_questions(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Question], dict[str, int]]:
    """The prompts of ``config.data`` in tokens, and counts; a prompt too long for ``max_length`` loses its beginning.

    Raises:
        InputError: no prompt is left, or there is no room for one.
    """
    room = config.max_length - config.max_new_tokens
    if room < 1:
        raise InputError(f"--max_length {config.max_length} leaves no prompt beside --max_new_tokens")
    intake, questions, cut = Intake(config.skip_invalid, config.ignore_columns), [], 0
    rendering = Rendering(
        tokenizer, config.template, config.system, config.allow_special_in_text, config.thoughts or "keep"
    )
    for record in data.load(config.data, config.format, intake):
        try:
            tokens = rendering.prompt_of(record)
        except RecordError as error:
            intake(error)
            continue
        cut += len(tokens) > room
        questions.append(Question(record, rendering.shortened(tokens, room, record.prompt, record.meta)))
    if not questions or not all(question.tokens for question in questions):
        raise InputError(f"{config.data}: " + ("a prompt has no tokens" if questions else "no usable prompt"))
    counts = {"prompts": len(questions), "prompt_truncated": cut, "skipped_invalid": len(intake.errors)}
    say_counts(counts)
    for sentence in said(rendering.counts):
        print(f"{config.data}: {sentence}", file=sys.stderr)
    return questions, counts


def load_actor(config: PPOConfig, questions: list[Question]) -> ActorCritic:
    """Policy and critic in float32 (bf16 comes by autocast) without dropout; hashes of what was loaded on stderr.

    Raises:
        InputError: the policy is an adapter: with it off, the reference would not be the start model.
    """
    with processes.whole_weights(config):
        policy: Any = models.load_policy(config.model, dtype="float32")
        critic = load_value_net(config.value_model, config.model) if config.value_model else None
    if hasattr(policy, "get_base_model"):
        raise InputError(f"model {config.model}: is an adapter; `rankalign merge` folds it into its base")
    print(f"policy {config.model}: weights sha256 {models.weights_fingerprint(policy)}", file=sys.stderr)
    if critic is not None:
        print(f"value net {config.value_model}: weights sha256 {models.weights_fingerprint(critic)}", file=sys.stderr)
        disable_dropout(critic)
    disable_dropout(policy)  # checkpointing updates in train mode, where dropout would wake
    layout, why = _layout(config, policy, critic, questions)
    print(f"layout: {layout} ({why})", file=sys.stderr)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs or {"use_reentrant": False})
    if config.use_lora:
        policy = adapters.add_lora(policy, config.lora_r, config.lora_alpha, 0.0, config.model_settings.lora_targets)
    return ActorCritic(policy, critic, layout, config.temperature)


def _layout(config: PPOConfig, policy: Any, critic: Any, questions: list[Question]) -> tuple[str, str]:
    """How rows are laid out; with ``auto``, decided by comparing both ways on the first prompts as texts."""
    if config.layout != "auto":
        return config.layout, "as asked"
    if critic is not None and not logps.supports_tree(critic):
        return "padded", logps.why_padded(critic)
    first = [question.tokens for question in questions[: config.per_device_train_batch_size]]
    with mixed(config.precision):
        return logps.choose_layout(policy, first, [[tokens] for tokens in first])


def _run(trainer: PPOTrainer, config: PPOConfig, output: Path, settings: dict[str, Any]) -> None:
    """All steps that are left, each with a line in ``log.jsonl``."""
    _resume(trainer, config, output, settings)
    stop = StopOnSignal()
    try:
        with Progress("ppo", trainer.steps, "step", done=trainer.step) as progress:
            while trainer.step < trainer.steps and not stop.caught:
                line = trainer.iterate()
                progress.add()
                _log(trainer, output, line)
                stop.agree()
                if stop.caught or trainer.step % config.save_steps == 0:
                    trainer.save(output, settings)
    finally:
        stop.restore()
    if trainer.step < trainer.steps:
        raise Interrupted(f"stopped at step {trainer.step}; the same command goes on from its checkpoint")


def _resume(trainer: PPOTrainer, config: PPOConfig, output: Path, settings: dict[str, Any]) -> None:
    if trainer.accelerator.is_main_process:
        remove_strays(output, "checkpoint-*")
    trainer.accelerator.wait_for_everyone()
    found = ppo_state.checkpoints(output)
    if not found:
        return
    last = found[-1]
    if not config.resume:
        raise InputError(f"{output} holds {last.name} of an earlier run; resume it or start over with --overwrite")
    if changed := differences(ppo_state.read_facts(last)["settings"], settings):
        raise InputError(
            f"{last} was made with other settings ({'; '.join(changed[:8])}); "
            "go on with those, name another --output_dir, or start over with --overwrite"
        )
    print(f"resuming from {last}", file=sys.stderr)
    trainer.restore(last)


def _log(trainer: PPOTrainer, output: Path, line: dict[str, Any]) -> None:
    """Keep ``log.jsonl`` equal to the history, also after a resume from an earlier step, and show the line."""
    if not trainer.accelerator.is_main_process:
        return
    write_text(output / "log.jsonl", "".join(dumps(without_nan(entry)) + "\n" for entry in trainer.history))
    shown = " ".join(f"{key}={line[key]:.4g}" for key in ("reward", "kl", "policy_loss", "value_loss", "clip_fraction"))
    print(f"step {line['step']}/{trainer.steps}: {shown}", file=sys.stderr, flush=True)

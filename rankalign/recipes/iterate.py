"""Iterative and online rank training: the model answers anew, the answers are graded, it learns from their order.

IP-n and OP-k of RRHF (Yuan et al. 2023, section 3.1 and table 1), and with the loss ``raft`` RAFT (Dong et al. 2023).
Every step is resumable: killed anywhere, the same command ends in the uninterrupted run's files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from rankalign.data.encode import encode_text
from rankalign.data.load import load
from rankalign.data.records import CandidateSet, is_own, read, score_of
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models.identity import hashes_of
from rankalign.models.merge import merge_lora
from rankalign.recipes.apart import train_apart
from rankalign.recipes.contents import contents
from rankalign.recipes.launch import launcher
from rankalign.recipes.refresh import Ahead, Refresher, announce, round_folder
from rankalign.recipes.rollouts import watch_of
from rankalign.recipes.rounds import KL, Current, Gatherer, IterateConfig, is_current, ranked_by
from rankalign.stages.generation import Answerer
from rankalign.storage import manifest, outputs
from rankalign.storage.files import read_text, sha256_file, write_text
from rankalign.storage.jsonl import dumps, loads, read_rows, write_rows
from rankalign.storage.sources import is_there, sha256_of
from rankalign.training.arguments import TrainConfig, parse_settings
from rankalign.training.online import StartModel, plan, train_online
from rankalign.training.processes import is_first, spreads_weights
from rankalign.training.run import train

__all__ = ["IterateConfig", "run"]

KEEP = ("all", "last")
# Settings that no result depends on; of the processes their number stands in it for itself.
NO_MATTER = ("output", "keep", "overwrite", "num_processes", "launch")
METHODS = ("rank", "sft")


def run(config: IterateConfig) -> dict[str, Any]:
    """Run all rounds; leave the final model, every round's records, ``log.jsonl``, ``result.json`` and a manifest.

    Returns:
        ``{"output", "model", "rounds": [{"round", "model", "steps", "refreshed_at", "mean_score", "max_score", "kl",
        ...}], "steps", "sampled_tokens"}``.

    Raises:
        InputError: bad settings or data.
        Interrupted: training was stopped by a signal; the same call goes on.
    """
    _check(config)
    if _apart(config):
        config = dataclasses.replace(config, num_processes=_processes(config))
    folder, settings = Path(config.output), _settings(config)
    for part in (folder / "model", *folder.glob("round-*")):
        outputs.check_reads(part, _reads(config), config.overwrite)
    if config.overwrite:
        with PartialState().main_process_first():  # one removes it, and the others find it gone
            _clear(folder)
    elif manifest.is_finished(folder, settings):
        print(f"{folder} is finished already with these settings: nothing to do", file=sys.stderr)
        return {**loads(read_text(folder / "result.json")), "already_finished": True}
    with PartialState().main_process_first():
        manifest.claim(folder, settings)
    rows, lines = _online(config) if config.refresh_every else _iterate(config)
    if is_first():
        _conclude(config, settings, rows, lines)
    PartialState().wait_for_everyone()
    return {**loads(read_text(folder / "result.json")), "already_finished": False}


def _conclude(
    config: IterateConfig, settings: dict[str, Any], rows: list[dict[str, Any]], lines: list[dict[str, Any]]
) -> None:
    """Write log, result and, last, the manifest."""
    folder = Path(config.output)
    for path in folder.glob("round-*/weights"):  # of the last block, which is learned
        shutil.rmtree(path)
    write_rows(folder / "log.jsonl", lines)
    result = {
        "output": str(folder),
        "model": str(folder / "model"),
        "rounds": rows,
        "steps": sum(row["steps"] for row in rows),
        "sampled_tokens": sum(row["sampled_tokens"] for row in rows),
    }
    write_text(folder / "result.json", dumps(result) + "\n")
    made = [round_folder(config, row["round"]) / "candidates.jsonl" for row in rows]
    manifest.write(folder, "iterate", settings, [config.prompts], [*made, folder / "log.jsonl", folder / "result.json"])


def _check(config: IterateConfig) -> None:
    names = [scorer.name for scorer in config.scorers]
    problems = {
        f"judge {config.judge!r} is none of the scorers": config.judge not in names,
        f"scorers: the name {KL!r} is taken, kl_coef stores the divergence under it": bool(config.kl_coef)
        and KL in names,
        "rounds must be at least 1": config.rounds < 1,
        "refresh_every must not be negative": config.refresh_every < 0,
        "ahead is 0 or 1, and needs refresh_every": config.ahead not in (0, 1 if config.refresh_every else 0),
        "kl_coef must not be negative": not config.kl_coef >= 0,
        "keep_above: quantiles lie between 0 and 1": not all(0 <= share <= 1 for share in config.keep_above),
        f"unknown keep {config.keep!r} (one of: {', '.join(KEEP)})": config.keep not in KEEP,
        "policies: none samples with the model that is trained; name `default` as its model": (
            not any(map(is_current, config.policies))
        ),
        "policies: the model that is trained takes no adapter of another": any(
            is_current(policy) and policy.adapter for policy in config.policies
        ),
    }
    if broken := [text for text, yes in problems.items() if yes]:
        raise InputError(broken[0])
    wanted = _training(config, 1)  # refused now, not when the first round is sampled and scored
    if not config.refresh_every and wanted.world_size > 1:
        raise InputError(
            "each round starts its own processes: give iterate --num_processes and --launch, and no launcher"
        )
    if config.refresh_every:
        spreads_weights(wanted)  # says what cannot be made whole to answer
    several = wanted.world_size > 1 and not config.ahead
    if several and any(is_current(policy) and policy.engine == "vllm" for policy in config.policies):
        raise InputError("online, engine vllm answers in the one process that trains: with several give --async 1")
    for policy in filter(is_current, config.policies):
        Answerer(policy)  # says what its engine lacks or cannot follow; nothing heavy is loaded
    if _apart(config):
        launcher(config.launch or "ddp", config.num_processes, [])  # says what cannot be started


def _apart(config: IterateConfig) -> bool:
    """Whether rounds are trained in processes of their own."""
    return not config.refresh_every and (bool(config.launch) or config.num_processes > 1)


def _settings(config: IterateConfig) -> dict[str, Any]:
    """All that the result depends on, as it reads back from JSON."""
    if not is_there(config.prompts):
        raise InputError(f"{config.prompts}: no such file")
    own = {key: value for key, value in dataclasses.asdict(config).items() if key not in NO_MATTER}
    if not config.ahead:
        own.pop("ahead")  # which version 0.1 did not have
    if (processes := _processes(config)) > 1:
        own["processes"] = processes  # an update takes so many micro-batches
    hashes = {"prompts_sha256": sha256_of(config.prompts), **hashes_of(config.model)}
    others = [policy for policy in config.policies if not is_current(policy)]
    return dict(loads(dumps({**own, **hashes, **contents(others, config.scorers)})))


def _reads(config: IterateConfig) -> dict[str, str]:
    """What is to be left in place."""
    return {
        "model": config.model,
        "prompts": config.prompts,
        **{f"policy {p.name!r}": p.model for p in config.policies},
    }


def _clear(folder: Path) -> None:
    """Remove what an earlier run made, and nothing else."""
    for path in [folder / "model", *folder.glob("round-*")]:
        shutil.rmtree(path, ignore_errors=True)
    for name in ("manifest.json", "result.json", "log.jsonl", manifest.CLAIM):
        (folder / name).unlink(missing_ok=True)


def _training(config: IterateConfig, number: int, **fixed: Any) -> TrainConfig:
    """Settings of the training of a round.

    Raises:
        InputError: they do not fit, or not into rounds.
    """
    settings = {"seed": config.seed, **config.train, "judge": ranked_by(config, number), **fixed}
    wanted = parse_settings(settings)
    if wanted.method not in METHODS:
        raise InputError(f"method {wanted.method}: rounds are trained by {' or '.join(METHODS)}")
    return wanted


def _processes(config: IterateConfig) -> int:
    """How many processes make an update."""
    if _apart(config):
        return config.num_processes or torch.cuda.device_count()
    return PartialState().num_processes


# --- IP-n --------------------------------------------------------------------------------------------------------


def _iterate(config: IterateConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every round a whole training run, from the model of the round before; rows of rounds and lines of the log."""
    rows: list[dict[str, Any]] = []
    model = config.model
    for number in range(1, config.rounds + 1):
        folder = round_folder(config, number)
        done = folder / "result.json"
        if not done.exists():
            announce(f"round {number}/{config.rounds}: {model} answers, is graded and learns")
            row, lines = _round(config, number, model, sum(row["steps"] for row in rows))
            write_rows(folder / "log.jsonl", lines)
            write_text(done, dumps(row) + "\n")  # last: a round that has its row is finished
        if config.keep == "last" and number > 1:
            _forget(config, number - 1)  # not before the round that started from it is done
        rows.append(loads(read_text(done)))
        model = str(_model_folder(config, number))
    return rows, [line for row in rows for _, line in read_rows(round_folder(config, row["round"]) / "log.jsonl")]


def _model_folder(config: IterateConfig, number: int) -> Path:
    return (Path(config.output) if number == config.rounds else round_folder(config, number)) / "model"


def _forget(config: IterateConfig, number: int) -> None:
    for name in ("model", "adapter"):
        shutil.rmtree(round_folder(config, number) / name, ignore_errors=True)


def _round(config: IterateConfig, number: int, model: str, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Sample, score and train; the round's row and log."""
    folder, target = round_folder(config, number), _model_folder(config, number)
    now = Current(number, step, models.weights_of(model), model)
    gatherer = _gatherer(config, StartModel(config.model))
    path = gatherer.gather(folder, now, config.prompts, config.max_prompts)
    del gatherer  # scorers and samplers leave memory before training
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where nothing was there
    own = {"token_cache": str(folder / "tokens"), **config.train}  # of no use to any other run
    config = dataclasses.replace(config, train=own)
    wanted = _training(config, number, model=model, data=str(path), output_dir=str(target))
    if wanted.use_lora:
        wanted.output_dir = str(folder / "adapter")
    if _apart(config):
        made = {"model": model, "data": str(path), "output_dir": str(wanted.output_dir)}
        settings = {"seed": config.seed, **own, "judge": ranked_by(config, number), **made}
        train_apart(settings, folder / "train.json", config.launch or "ddp", config.num_processes)
        told = manifest.read(str(wanted.output_dir)) or {}
    else:
        told = train(wanted, watch_of)
    shutil.rmtree(folder / "tokens", ignore_errors=True)
    if wanted.use_lora and not target.exists():  # the next round needs whole weights
        merge_lora(str(wanted.output_dir), str(target))
    lines = [row for _, row in read_rows(Path(str(wanted.output_dir)) / "log.jsonl")]
    globally = [{**row, "step": row["step"] + step, "round": number, "refreshed_at": step} for row in lines]
    return _row(config, number, path, told["steps"], step, str(target)), globally


def _gatherer(config: IterateConfig, start: StartModel) -> Gatherer:
    """Sampling and scoring as the settings say."""
    return Gatherer(config, _training(config, 1, model=config.model).data_settings, start)


# --- OP-k --------------------------------------------------------------------------------------------------------


def _online(config: IterateConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One training run that answers its next prompts anew every ``refresh_every`` updates; rows of blocks, and log."""
    prompts = list(load(config.prompts))
    prompts = prompts[: config.max_prompts] if config.max_prompts else prompts
    wanted = _training(config, 1, model=config.model, data=config.prompts, output_dir=f"{config.output}/model")
    if "train_sampling_strategy" not in config.train:
        wanted.train_sampling_strategy = "sequential"  # blocks take the prompts in order
    steps = plan(wanted, len(prompts), config.refresh_every, config.ahead)
    # Where the start is an adapter that trains on, switching it off would give its base.
    start = StartModel(config.model, below_adapter=wanted.use_lora and not models.is_adapter(config.model))
    gatherer = _gatherer(config, start)
    refresher = Ahead(config, prompts, gatherer, steps) if config.ahead else Refresher(config, prompts, gatherer)
    ids = [record.id for record in prompts]
    # With this hash the identity of training covers how its answers are sampled and graded.
    with contextlib.closing(refresher):
        train_online(wanted, ids, steps, refresher, start, watch_of(wanted), settings_sha256=_settings_hash(config))
    if not is_first():
        return [], []
    rows = [_row(config, b.number, refresher.path(b), b.updates, b.written, None) for b in steps]
    return rows, [line for _, line in read_rows(Path(config.output) / "model/log.jsonl")]


def _settings_hash(config: IterateConfig) -> str:
    return sha256_file(Path(config.output) / manifest.CLAIM)


# --- what a round was like ---------------------------------------------------------------------------------------


def _row(config: IterateConfig, number: int, path: Path, steps: int, step: int, model: str | None) -> dict[str, Any]:
    """The figures of a round, from its records."""
    sets = list(read(path))
    scores = [values for record in sets if (values := _scores(record, config.judge))]
    return {
        "round": number,
        "model": model,
        "steps": steps,
        "refreshed_at": step,
        "prompts": len(sets),
        "mean_score": _mean([sum(values) / len(values) for values in scores]),
        "max_score": _mean([max(values) for values in scores]),
        "kl": _mean([kl for record in sets for kl in _scores(record, KL, own=True)]) if config.kl_coef else None,
        "sampled_tokens": _tokens(config, sets),
    }


def _scores(record: CandidateSet, name: str, own: bool = False) -> list[float]:
    """A record's scores, an answer that came several times several times; ``own`` takes the current model's alone."""
    answers = [r for r in record.responses if not own or is_own(r)]
    return [value for r in answers if (value := score_of(record, r, name)) is not None for _ in range(r.count)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _tokens(config: IterateConfig, sets: Sequence[CandidateSet]) -> int:
    """Tokens of all answers that were written for this run, ends of sequence included."""
    tokenizer = models.load_tokenizer(config.model)
    written = {policy.name for policy in config.policies if policy.engine != "replay"}

    def length(text: str, tokens: Mapping[str, Any] | None) -> int:
        return len(tokens["ids"]) if tokens else len(encode_text(tokenizer, text))

    answers = [r for record in sets for r in record.responses if r.policy in written]
    return sum((length(r.text, r.tokens) + r.finished) * r.count for r in answers)

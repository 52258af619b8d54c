"""Which page of the documentation helps with an error: that of the part of the house which refused."""

from __future__ import annotations

from types import TracebackType

# A module, or all that lie in it, and the page; of several that fit, the longest counts. Ground floors (storage,
# config, registries) are not here: the page is then that of who called them.
OF_MODULES = {
    "rankalign.losses": "losses.md",
    "rankalign.rows": "training.md#memory",
    "rankalign.rows.flash_varlen": "gpu.md",
    "rankalign.rows.head_liger": "gpu.md",
    "rankalign.models": "support.md",
    "rankalign.models.delta": "deltas.md",
    "rankalign.models.quant": "scaling.md#less-memory",
    "rankalign.models.sharded": "scaling.md",
    "rankalign.data": "your-data.md",
    "rankalign.data.convert": "formats.md",
    "rankalign.data.mixing": "formats.md#several-data-sets-into-one-and-a-split",
    "rankalign.data.formats": "formats.md",
    "rankalign.data.lint": "lint.md",
    "rankalign.data.specs": "training.md#what---data-names",
    "rankalign.engines": "engines.md",
    "rankalign.scorers": "judging.md",
    "rankalign.scorers.function": "extending.md",
    "rankalign.scorers.combine": "generation.md#several-judges-as-one",
    "rankalign.scorers.reward_model": "reward_models.md",
    "rankalign.scorers.reward_server": "reward_models.md",
    "rankalign.scorers.served_states": "reward_models.md#a-head-here-and-its-trunk-on-a-server",
    "rankalign.stages": "generation.md",
    "rankalign.training": "training.md",
    "rankalign.training.foreign": "migrating.md",
    "rankalign.training.identity": "training.md#interrupting",
    "rankalign.training.ilql": "ilql.md",
    "rankalign.training.old_names": "migrating.md",
    "rankalign.training.plan": "plan.md",
    "rankalign.training.ppo": "ppo.md",
    "rankalign.training.ppo_settings": "ppo.md",
    "rankalign.training.processes": "scaling.md",
    "rankalign.training.reward": "reward_models.md",
    "rankalign.training.settings.LossSettings": "losses.md",
    "rankalign.training.spread": "scaling.md",
    "rankalign.training.trainer_flags": "training-flags.md",
    "rankalign.evaluation": "evaluation.md",
    "rankalign.evaluation.report": "report.md",
    "rankalign.interactive.conversation": "chat.md",
    "rankalign.interactive.ranking": "label.md",
    "rankalign.interactive.repl": "chat.md",
    "rankalign.interactive.votes": "chat.md",
    "rankalign.recipes.iterate": "iterate.md",
    "rankalign.recipes.launch": "scaling.md",
    "rankalign.recipes.paper": "results.md",
    "rankalign.recipes.push": "training.md#sharing",
    "rankalign.recipes.rounds": "iterate.md",
    "rankalign.recipes.sweep": "sweep.md",
    "rankalign.recipes.sweep_metric": "sweep.md",
}
OF_COMMANDS = {
    "demo": "quickstart.md",
    "init": "quickstart.md",
    "sample": "generation.md",
    "score": "generation.md",
    "merge": "generation.md#several-processes",
    "plan": "plan.md",
    "train": "training.md",
    "sweep": "sweep.md",
    "eval": "evaluation.md",
    "compare": "evaluation.md#comparing-two-systems",
    "chat": "chat.md",
    "label": "label.md",
    "sheet": "evaluation.md#people",
    "convert": "formats.md",
    "convert-config": "migrating.md",
    "lint": "lint.md",
    "iterate": "iterate.md",
    "run": "quickstart.md",
    "table": "results.md",
    "report": "report.md",
    "push": "training.md#sharing",
    "watch": "watch.md",
    "delta": "deltas.md",
    "verify": "generation.md#what-is-safe-and-when",
    "diff": "generation.md#what-is-safe-and-when",
    "env": "faq.md",
    "completion": "quickstart.md#the-tab-key",
    "ls": "extending.md",
}


def page_of(command: str, error: BaseException) -> str:
    """The page for an error of a command, as a path in the repository.

    Args:
        command: a name of :data:`OF_COMMANDS`.
        error: as it was caught, its traceback with it.
    """
    page = OF_COMMANDS[command]
    trace: TracebackType | None = error.__traceback__
    while trace is not None:  # from the command down to who refused
        frame, trace = trace.tb_frame, trace.tb_next
        page = _of_module(f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_qualname}") or page
    return f"docs/{page}"


def _of_module(name: str) -> str:
    while name and name not in OF_MODULES:
        name = name.rpartition(".")[0]
    return OF_MODULES.get(name, "")

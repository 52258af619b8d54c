"""rankalign: align language models by ranking. See README.md; nothing heavy is imported until a name is used."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankalign.api import compare as compare
    from rankalign.api import sample as sample
    from rankalign.api import score as score
    from rankalign.api import train as train
    from rankalign.data.frame import frame as frame
    from rankalign.data.records import CandidateSet as CandidateSet
    from rankalign.data.records import Response as Response
    from rankalign.data.records import read as read
    from rankalign.data.records import write as write
    from rankalign.losses import LOSSES as LOSSES
    from rankalign.losses.ranked import Ranked as Ranked
    from rankalign.models.load import load_policy as load_policy
    from rankalign.rows.logps import list_logps as list_logps

__version__ = "0.1.0"

# The front door: what most people need, and where it lives.
_NAMES = {
    "train": "rankalign.api",
    "sample": "rankalign.api",
    "score": "rankalign.api",
    "compare": "rankalign.api",
    "read": "rankalign.data.records",
    "write": "rankalign.data.records",
    "CandidateSet": "rankalign.data.records",
    "Response": "rankalign.data.records",
    "frame": "rankalign.data.frame",
    "load_policy": "rankalign.models.load",
    "Ranked": "rankalign.losses.ranked",
    "LOSSES": "rankalign.losses",
    "list_logps": "rankalign.rows.logps",
}
__all__ = ["__version__", *_NAMES]

# Import paths of version 0.1 and where their contents stand now.
_MOVED = dict(
    line.split()
    for line in """
    adapters models.adapters
    attention rows.attention
    batching data.encode
    chat interactive.conversation
    convert data.convert
    default_model models.default
    delta models.delta
    delta_legacy models.delta.arithmetic
    evaluation.agreement evaluation.raters.accuracy
    evaluation.alpaca_eval evaluation.pairwise.alpaca_eval
    evaluation.checks evaluation.report.checks
    evaluation.diagnosis evaluation.texts.while_training
    evaluation.divergence evaluation.texts.divergence
    evaluation.hack evaluation.report.hack
    evaluation.judged evaluation.pairwise.pairing
    evaluation.judging evaluation.pairwise.live
    evaluation.ladder evaluation.pairwise.ladder
    evaluation.ledger evaluation.report.hard_examples
    evaluation.lexical evaluation.texts.lexical
    evaluation.likeness evaluation.texts.likeness
    evaluation.numerics evaluation.texts.numerics
    evaluation.orders evaluation.pairwise.orders
    evaluation.pairwise evaluation.pairwise.scores
    evaluation.perplexity evaluation.texts.perplexity
    evaluation.plots evaluation.report.plots
    evaluation.raters evaluation.raters.concordance
    evaluation.recompute evaluation.pairwise.stored
    evaluation.report evaluation.report.page
    evaluation.reviews evaluation.pairwise.reviews
    evaluation.reward evaluation.raters.reward
    evaluation.reward_bench evaluation.raters.reward_bench
    evaluation.runs evaluation.report.runs
    evaluation.sheets evaluation.pairwise.sheets
    evaluation.variety evaluation.texts.variety
    experiment recipes.experiment
    files storage.files
    folders storage.folders
    formats data.formats
    gemm rows.gemm
    generation stages.generation
    head rows.head
    iterate recipes.iterate
    journal storage.journal
    jsonl storage.jsonl
    label interactive.ranking
    linears rows.linears
    lint data.lint
    lint_rules data.lint.rules
    logps rows.logps
    manifest storage.manifest
    memory training.plan.memory
    mixing data.mixing
    models models.load
    pages interactive.pages
    paper recipes.paper
    plan training.plan
    quant models.quant
    ranked losses.ranked
    recompute rows.recipes
    records data.records
    repl interactive.repl
    rewards rows.rewards
    rollouts recipes.rollouts
    rounds recipes.rounds
    runner_ray stages.ray_runner
    shards stages.shards
    stages stages.stage
    templates data.templates
    tiny models.tiny
    training.ilql training.ilql.trainer
    training.ilql_math training.ilql.math
    training.ppo training.ppo.trainer
    training.ppo_math training.ppo.math
    training.ppo_run training.ppo.run
    training.ppo_state training.ppo.state
    training.value training.ppo.value
    tree rows.tree
    two_pass rows.two_pass
    votes interactive.votes
    weights models.weights
    """.strip().splitlines()
)


def __getattr__(name: str) -> Any:
    """A name of the front door, imported when it is first asked for."""
    if name not in _NAMES:
        raise AttributeError(f"module 'rankalign' has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


# Names of an old file that are not in the file which has its other names.
_ELSEWHERE = {"rankalign.models.merge_lora": "rankalign.models.merge"}


def moved(room: str) -> Any:
    """``__getattr__`` for a room with an old file's name (``rankalign.models``): that file's names, with a warning."""

    def find(name: str) -> Any:
        new = _ELSEWHERE.get(f"{room}.{name}") or f"rankalign.{_MOVED[room.removeprefix('rankalign.')]}"
        # A file of the room goes first: `from rankalign.models import load` asks here before it looks for the file.
        is_file = name.startswith("__") or importlib.util.find_spec(f"{room}.{name}") is not None
        if is_file or not hasattr(module := importlib.import_module(new), name):
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        _warn(f"{room}.{name}", f"{new}.{name}")
        # `from room import name` asks twice; kept in the room, the name is warned of once.
        vars(sys.modules[room])[name] = getattr(module, name)
        return getattr(module, name)

    return find


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}; the old path goes in version 0.3", DeprecationWarning, stacklevel=3)


class _Moved(MetaPathFinder, Loader):
    """Finds what the table names under its old path, unless a room has that name now (see :func:`moved`).

    Asked first: the files of a folder that moved lie in the folder that its old name stands for, where Python would
    find them a second time, as other modules with other classes.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """A spec for an old path, or None."""
        if not name.startswith("rankalign.") or not _new_path(name):
            return None
        is_room = name.removeprefix("rankalign.") in _MOVED and PathFinder.find_spec(name, path) is not None
        return None if is_room else ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module that stands under the new path: one object under two names."""
        new = _new_path(spec.name)
        _warn(spec.name, new)
        module = importlib.import_module(new)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run, it ran under its own name; but the import system has put the old path's spec on it."""
        module.__spec__ = self.spec


def _new_path(name: str) -> str:
    """``rankalign.formats.trl`` to ``rankalign.data.formats.trl``; '' for what never moved."""
    whole = name.removeprefix("rankalign.")
    folder, _, file = whole.partition(".")
    if whole in _MOVED:
        return f"rankalign.{_MOVED[whole]}"
    return f"rankalign.{_MOVED[folder]}.{file}" if folder in ("formats", "paper", "pages") else ""


sys.meta_path.insert(0, _Moved())

"""Writes ``docs/settings.md``: every key of every configuration file, from the classes that read them.

python -m docs.reference
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from rankalign.config import SampleConfig, ScoreConfig, ScorerConfig
from rankalign.engines import Policy, SamplingParams
from rankalign.recipes.experiment import ExperimentConfig
from rankalign.recipes.iterate import IterateConfig
from rankalign.scorers.function import FunctionScorer
from rankalign.scorers.judge import JudgeScorer
from rankalign.scorers.reward_model import RewardModelScorer
from rankalign.scorers.reward_server import RewardServerScorer
from rankalign.scorers.token_rewards import TokenRewardScorer
from rankalign.training.arguments import TrainConfig
from rankalign.training.ppo_settings import PPOSettings
from rankalign.training.settings import GROUPS
from rankalign.training.trainer_flags import LIMITED, REFUSED

PAGE = Path(__file__).with_name("settings.md")
FLAGS_PAGE = Path(__file__).with_name("training-flags.md")
FLAGS_HEAD = """# Every flag of transformers' trainer

`rankalign train` knows every field of transformers' `TrainingArguments`, as a flag or in YAML. Each has its effect, or
is refused at the start by its name and with the reason; none is accepted and ignored. This page is written by
`python -m docs.reference` for the installed transformers, and a test tries them all.

| flag | here | why |
|---|---|---|
"""
HEAD = """# Every setting

Settings stand in a YAML file (`--config FILE`) and behind flags; a flag wins over the file, the file over the default.
An unknown key is an error that names the nearest known one. This page is written by `python -m docs.reference` from
the classes that read the keys, and a test holds it to them.
"""
SECTIONS: list[tuple[str, str, type[Any]]] = [
    ("rankalign sample", "", SampleConfig),
    ("A policy", "One entry of `policies`. The keys of sampling stand flat beside these.", Policy),
    ("Sampling", "", SamplingParams),
    ("rankalign score", "", ScoreConfig),
    ("A scorer", "One entry of `scorers`; the options of its kind stand flat beside `name` and `kind`.", ScorerConfig),
    ("Scorer `function`", "", FunctionScorer),
    ("Scorer `reward_model`", "", RewardModelScorer),
    ("Scorer `reward_server`", "", RewardServerScorer),
    ("Scorer `token_rewards`", "", TokenRewardScorer),
    ("Scorer `judge`", "", JudgeScorer),
    (
        "rankalign train",
        "Beside these, the arguments of transformers' trainer, see [training-flags.md](training-flags.md).",
        TrainConfig,
    ),
    ("rankalign train --method ppo", "", PPOSettings),
    ("rankalign run", "", ExperimentConfig),
    ("rankalign iterate", "", IterateConfig),
]


def page() -> str:
    """The page's text."""
    return "\n".join([HEAD, *(_section(*section) for section in SECTIONS)])


def flags_page() -> str:
    """The page on transformers' flags."""
    rows = []
    for item in dataclasses.fields(TrainingArguments):
        status = "refused" if item.name in REFUSED else "works, within limits" if item.name in LIMITED else "works"
        rows.append(f"| `{item.name}` | {status} | {REFUSED.get(item.name) or LIMITED.get(item.name, '')} |\n")
    return FLAGS_HEAD + "".join(rows)


def _section(title: str, note: str, kind: type[Any]) -> str:
    rows = _flags(kind) if kind in (TrainConfig, PPOSettings) else _described(kind)
    lines = [f"## {title}", "", *([note, ""] if note else []), "| key | default | what |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {default} | {_cell(text)} |" for name, default, text in rows), ""])


def _flags(kind: type[Any]) -> list[tuple[str, str, str]]:
    """Fields that carry a help text."""
    own = [f for group in (GROUPS if kind is TrainConfig else (kind,)) for f in dataclasses.fields(group)]
    return [(f.name, _default(f.default), str(f.metadata["help"])) for f in own]


def _described(kind: type[Any]) -> list[tuple[str, str, str]]:
    """Attributes or arguments that a docstring describes, with the defaults of the fields or of ``__init__``."""
    import inspect

    texts = _entries(inspect.getdoc(kind) or "")
    found = []
    for name, parameter in inspect.signature(kind).parameters.items():
        if name in texts:
            default = parameter.default
            found.append((name, "" if default is inspect.Parameter.empty else _default(default), texts[name]))
    return found


def _entries(doc: str) -> dict[str, str]:
    """``name: text`` entries of the sections Args and Attributes, lines joined."""
    found: dict[str, str] = {}
    for block in re.findall(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)", doc, re.MULTILINE):
        for name, text in re.findall(r"^    (\w+): (.*(?:\n        .*)*)", block, re.MULTILINE):
            found[name] = " ".join(text.split())
    return found


def _default(value: Any) -> str:
    if value is dataclasses.MISSING or type(value).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return ""
    return "" if value in ("", None, ()) or dataclasses.is_dataclass(value) else f"`{value}`"


def _cell(text: str) -> str:
    plain = re.sub(r":(?:data|func|class|meth|mod):`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", plain).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    FLAGS_PAGE.write_text(flags_page(), encoding="utf-8")

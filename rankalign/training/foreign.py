"""A command line or settings file of another trainer as settings of ours, with what became of each of its settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import yaml

from rankalign.config import read_yaml
from rankalign.errors import InputError
from rankalign.registry import did_you_mean
from rankalign.training.foreign_names import TOOLS, Tool

# Words by which a command is known; what stands before them is a launcher's.
_STARTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("openrlhf", re.compile(r"openrlhf\.cli\.train_(?P<kind>\w+)")),
    ("axolotl", re.compile(r"axolotl(\.cli\.train)?")),
    ("llamafactory", re.compile(r"llamafactory-cli|lmf|(.*/)?src/train(_bash)?\.py")),
    ("swift", re.compile(r"swift|(.*/)?swift/cli/(?P<kind>rlhf|sft)\.py")),
    ("trl", re.compile(r"trl|(.*/)?(trl|examples)/scripts/(?P<kind>\w+)\.py")),
)
# Keys that only one of them has, for settings files that come alone.
_KEYS = {
    "axolotl": ("base_model", "micro_batch_size", "sequence_len"),
    "llamafactory": ("finetuning_type", "stage", "cutoff_len"),
    "swift": ("rlhf_type", "train_type", "tuner_type"),
    "openrlhf": ("pretrain", "max_epochs", "micro_train_batch_size"),
    "trl": ("model_name_or_path", "dataset_name", "loss_type"),
}
_WHAT = ("rlhf_type", "stage", "rl", "task_type")  # settings that say what is trained
_ONLINE = ("online_dpo", "grpo", "rloo")


@dataclass
class Translation:
    """What became of a foreign run.

    Attributes:
        tool: a name of :data:`rankalign.training.foreign_names.TOOLS`.
        settings: ours, for ``rankalign train``.
        mapped: one line for each setting that has another name or value here.
        left: one line for each that has no effect here, with the reason.
        notes: what else a user should know.
    """

    tool: str
    settings: dict[str, Any] = field(default_factory=dict)
    mapped: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def translate_command(words: Sequence[str], known: Collection[str]) -> Translation:
    """A command line as its tool's documentation shows it, launcher and environment included.

    Args:
        words: split as a shell does.
        known: the names of our settings and of every loss's options.

    Raises:
        InputError: none of the tools, a settings file that cannot be read, or a stage that has no counterpart.
    """
    for place, word in enumerate(words):
        for tool, pattern in _STARTS:
            if found := pattern.fullmatch(word):
                kind = found.groupdict().get("kind") or ""
                return _of_command(tool, kind, words[:place], list(words[place + 1 :]), known)
    raise InputError(f"{' '.join(words[:6])} ...: no command of {', '.join(TOOLS)} is in it")


def translate_file(path: str, tool: str, known: Collection[str]) -> Translation:
    """A settings file; ``tool`` may be empty where its keys tell."""
    content = read_yaml(path)
    if not tool:
        scores = {name: sum(key in content for key in keys) for name, keys in _KEYS.items()}
        tool = max(scores, key=lambda name: scores[name])
        if not scores[tool]:
            raise InputError(f"{path}: no key tells whose settings these are; say --from {'|'.join(TOOLS)}")
    return _translate(tool, content, known)


def _of_command(tool: str, kind: str, before: Sequence[str], words: list[str], known: Collection[str]) -> Translation:
    if not kind and words and not words[0].startswith("-") and not words[0].endswith((".yaml", ".yml", ".json")):
        kind = words.pop(0)  # trl dpo, swift rlhf, axolotl train, llamafactory-cli train
    if kind in ("train", "train_bash", "rlhf"):
        kind = ""
    content: dict[str, Any] = {}
    while words and not words[0].startswith("-"):  # files first, then key=value as LLaMA-Factory takes them
        word = words.pop(0)
        if "=" in word:
            key, _, value = word.partition("=")
            content[key] = _value(value)
        else:
            content |= read_yaml(word)
    flags = _flags(words)
    if isinstance(flags.get("config"), str):
        content |= read_yaml(flags.pop("config"))
    done = _translate(tool, {**content, **flags}, known, kind)
    count = _processes(before)
    if count > 1:
        done.notes.append(f"it ran {count} processes: rankalign train --num_processes {count}")
    return done


def _processes(words: Sequence[str]) -> int:
    """How many processes the launcher was told to start; 1 where it was not told."""
    told = re.search(r"(?:nproc[_-]per[_-]node|num[_-]processes|num[_-]gpus|NPROC_PER_NODE)[ =](\d+)", " ".join(words))
    return int(told[1]) if told else 1


def _flags(words: Sequence[str]) -> dict[str, Any]:
    """``--key value ...``, ``--key=value`` and bare ``--key``; dotted names by their last part."""
    flags: dict[str, Any] = {}
    key = ""
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            name, equals, value = word.lstrip("-").partition("=")
            key = name.replace("-", "_").rpartition(".")[2]
            flags[key] = _value(value) if equals else []
        elif key and isinstance(flags[key], list):
            flags[key].append(_value(word))
        else:
            raise InputError(f"unexpected word {word!r} in the command line")
    single = {name: value[0] for name, value in flags.items() if isinstance(value, list) and len(value) == 1}
    return {name: single.get(name, True if value == [] else value) for name, value in flags.items()}


def _value(word: str) -> Any:
    """A word as YAML reads it, numbers such as 5e-7 included."""
    try:
        return float(word) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", word) else yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def _translate(tool: str, content: dict[str, Any], known: Collection[str], kind: str = "") -> Translation:
    if tool not in TOOLS:
        raise InputError(f"--from {tool}: unknown{did_you_mean(tool, TOOLS)}")
    table, done, content = TOOLS[tool], Translation(tool), dict(content)
    told = "command"
    for name in _WHAT:
        if isinstance(content.get(name), str):
            kind, told = content.pop(name), name
    if kind and kind not in table.kinds:
        raise InputError(f"{tool} {kind}: no counterpart here (there is one of: {', '.join(table.kinds)})")
    if kind:
        done.settings |= table.defaults.get(kind, {}) | table.kinds[kind]
        done.mapped.append(f"{told} {kind}: {_pairs(table.kinds[kind])}")
    if kind in table.defaults:
        done.notes.append(f"{tool}'s defaults for {kind}, where they differ: {_pairs(table.defaults[kind])}")
    else:
        done.notes.append("what was left to their defaults has ours")
    if kind in _ONLINE:
        done.notes.append(f"{kind} samples while it trains: put these settings under `train:` of `rankalign iterate`")
    for name, value in content.items():
        _take(table, name, value, known, done)
    _finish(done)
    return done


def _take(table: Tool, name: str, value: Any, known: Collection[str], done: Translation) -> None:
    if value is None:
        return  # an empty line of YAML
    if name.startswith("no_") and name not in known:  # transformers' parser makes one of each flag that is on
        name, value = name.removeprefix("no_"), False
    ours = table.names.get(name, name)
    if name in table.left:
        done.left.append(f"{name}: {table.left[name]}")
    elif ours in _SPECIAL:
        given, why = _SPECIAL[ours](value)
        if given or not why:
            done.mapped.append(f"{name} {value}: {_pairs(given)}")
        done.settings |= given
        if why:
            done.left.append(f"{name} {value}: {why}")
    elif ours in ("save_steps", "eval_steps") and value == -1:  # OpenRLHF's way to say never
        _put(done, name, value, {ours.replace("steps", "strategy"): "no"})
    elif ours in known or ours in _LATER:
        now = table.values.get((ours, value), value) if isinstance(value, str | bool | None) else value
        if now is None:
            done.left.append(f"{name} {value}: what is there by itself fits")
        else:
            _put(done, name, value, {ours: now})
    else:
        done.left.append(f"{name}: no setting of ours{did_you_mean(name, known)}")


def _put(done: Translation, name: str, value: Any, given: dict[str, Any]) -> None:
    done.settings |= given
    if given and given != {name: value}:
        done.mapped.append(f"{name} {value}: {_pairs(given)}")


def _pairs(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "what is done anyhow"


Special = Callable[[Any], tuple[dict[str, Any], str]]


def _adapter(value: Any) -> tuple[dict[str, Any], str]:
    if value in ("lora", "qlora"):
        return {"use_lora": True, **({"load_in_4bit": True} if value == "qlora" else {})}, ""
    return {}, "" if value in ("full", None) else "LoRA, QLoRA and DoRA are the adapters here"


def _bits(value: Any) -> tuple[dict[str, Any], str]:
    return ({f"load_in_{value}bit": True}, "") if value in (4, 8) else ({}, "4 or 8 bits")


def _data(value: Any) -> tuple[dict[str, Any], str]:
    """One path, a list of them, or axolotl's mappings; names separated by commas are LLaMA-Factory's."""
    listed = value if isinstance(value, list) else [part.strip() for part in str(value).split(",")]
    paths = [item.get("path", "") if isinstance(item, dict) else str(item) for item in listed]
    splits = [item.get("split", "") if isinstance(item, dict) else "" for item in listed]
    names = [
        f"{path}:{split}" if split and split != "train" else path for path, split in zip(paths, splits, strict=True)
    ]
    types = [str(item["type"]) for item in listed if isinstance(item, dict) and item.get("type")]
    why = f"columns are known by their names; type {', '.join(types)} is not read" if types else ""
    return {"data": ",".join(names)}, why


def _target(value: Any) -> tuple[dict[str, Any], str]:
    names = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return {"lora_target_modules": "auto" if names in ("all", "all-linear") else names}, ""


def _parameters(value: Any) -> tuple[dict[str, Any], str]:
    return {"lora_target_parameters": ",".join(map(str, value)) if isinstance(value, list) else str(value)}, ""


def _betas(value: Any) -> tuple[dict[str, Any], str]:
    if isinstance(value, list) and len(value) == 2:
        return {"adam_beta1": value[0], "adam_beta2": value[1]}, ""
    return {}, "expected two numbers"


def _stage(value: Any) -> tuple[dict[str, Any], str]:
    if value in (2, 3):
        return {"deepspeed": f"train_scripts/deepspeed/zero{value}.json"}, ""
    return {}, "" if value == 0 else "stages 2 and 3 are ready-made; a file of yours goes behind --deepspeed"


_SPECIAL: dict[str, Special] = {
    "adapter": _adapter,
    "load_in_bits": _bits,
    "data": _data,
    "lora_target_modules": _target,
    "lora_target_parameters": _parameters,
    "adam_betas": _betas,
    "zero_stage": _stage,
    "pure_bf16": lambda value: ({"bf16": True}, "weights stay float32 where all of them are trained"),
    "ipo": lambda value: ({"loss": "ipo"} if value else {}, ""),
    "reward_model": lambda value: ({}, "scores come from `rankalign score --reward_model`, before training"),
}
_LATER = (
    "warmup_ratio",
    "train_batch_size",
    "loss_weights",
    "dataset_train_split",
    "dataset_test_split",
    "ld_alpha",
    "use_weighting",
)  # no fields of ours, and yet read


def _trls_kinds(done: Translation) -> None:
    """Losses that TRL makes of its sigmoid by a setting: LD-DPO and aligned WPO."""
    alpha, weighed = done.settings.pop("ld_alpha", None), done.settings.pop("use_weighting", False)
    for setting, value, given in (
        ("ld_alpha", alpha, {"loss": "ld_dpo", "alpha": alpha}),
        ("use_weighting", weighed or None, {"loss": "wpo_aligned"}),
    ):
        if value is None:
            continue
        if done.settings.get("loss", "dpo") == "dpo":
            _put(done, setting, value, given)
        else:
            done.left.append(f"{setting} {value}: here it is a loss of its own, {_pairs(given)}")


def _finish(done: Translation) -> None:
    """What depends on several settings at once."""
    settings = done.settings
    _trls_kinds(done)
    whole, micro = settings.pop("train_batch_size", None), settings.get("per_device_train_batch_size", 1)
    if whole:
        settings["gradient_accumulation_steps"] = max(1, int(whole) // int(micro))
        done.notes.append(f"train_batch_size {whole} = {micro} x accumulation x processes; accumulation is set for one")
    data = settings.get("data")
    if split := settings.pop("dataset_train_split", None):
        settings["data"] = f"{data}:{split}"
        done.mapped.append(f"dataset_train_split {split}: data {data}:{split}")
    if split := settings.pop("dataset_test_split", None):
        settings["eval_data"] = f"{data}:{split}"
        done.mapped.append(f"dataset_test_split {split}: eval_data {data}:{split}")
    if "warmup_ratio" in settings:
        settings["warmup_steps"] = settings.pop("warmup_ratio")
        done.mapped.append(f"warmup_ratio {settings['warmup_steps']}: warmup_steps {settings['warmup_steps']}")
    if int(settings.get("lora_r") or 0) > 0 and done.tool == "openrlhf":  # it has no other switch
        settings["use_lora"] = True
    if not settings.get("use_lora"):
        for name in [name for name in settings if name.startswith("lora_")]:
            done.left.append(f"{name} {settings.pop(name)}: does nothing without an adapter")
    path = str(settings.get("model", ""))
    if PurePosixPath(path).suffix in (".yaml", ".yml"):
        raise InputError(f"model {path}: expected a model, found a settings file")

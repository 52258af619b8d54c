"""Settings: dataclasses, filled from one flat YAML file and then from flags; an unknown key is an error with a hint."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rankalign.engines import Policy, SamplingParams
from rankalign.errors import InputError
from rankalign.registry import did_you_mean
from rankalign.storage.files import read_text
from rankalign.storage.sources import is_there

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Settings of ``rankalign sample``.

    Attributes:
        prompts: records with the prompts.
        output: where the candidates go.
        policies: who answers.
        seed: base seed of all policies.
        max_prompts: take the first so many prompts; 0 takes all.
        overwrite: replace a finished or half-finished output.
        shard: ``i/n`` does every n-th batch from the i-th (from 0) into a file of its own; empty does all.
        runner: a name in :data:`rankalign.stages.stage.RUNNERS`.
        workers: how many the runner may use; 0 leaves it to the runner.
        on_error: ``stop`` at the first request that a server refuses for good, or ``skip`` those and count them.
        retry_failed: ask again for what an earlier run skipped.
        skip_invalid: leave bad records out, and count them.
        ignore_columns: columns that may stay unread, with commas between them, or ``all``.
    """

    prompts: str
    output: str
    policies: list[Policy]
    seed: int = 0
    max_prompts: int = 0
    overwrite: bool = False
    shard: str = ""
    runner: str = "local"
    workers: int = 0
    on_error: str = "stop"
    retry_failed: bool = False
    skip_invalid: bool = False
    ignore_columns: str = ""


@dataclasses.dataclass(frozen=True)
class ScorerConfig:
    """One scorer: ``name`` keys its scores, ``kind`` is one of ``rankalign ls scorers``, the rest are its options."""

    name: str
    kind: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Settings of ``rankalign score``.

    Attributes:
        input: records with responses.
        output: where the scored records go.
        scorers: who grades.
        overwrite: replace a finished or half-finished output.
        shard: ``i/n`` does every n-th batch from the i-th (from 0) into a file of its own; empty does all.
        runner: a name in :data:`rankalign.stages.stage.RUNNERS`.
        workers: how many the runner may use; 0 leaves it to the runner.
        on_error: ``stop`` at the first request that a server refuses for good, or ``skip`` those and count them.
        retry_failed: ask again for what an earlier run skipped.
        skip_invalid: leave bad records out, and count them.
        ignore_columns: columns that may stay unread, with commas between them, or ``all``.
    """

    input: str
    output: str
    scorers: list[ScorerConfig]
    overwrite: bool = False
    shard: str = ""
    runner: str = "local"
    workers: int = 0
    on_error: str = "stop"
    retry_failed: bool = False
    skip_invalid: bool = False
    ignore_columns: str = ""


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file that holds one mapping.

    Raises:
        InputError: missing, not YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected `key: value` lines")
    return content


def load(kind: type[T], path: str | None, **flags: Any) -> T:
    """Defaults, then the YAML file, then every flag that is not None.

    Raises:
        InputError: an unknown or missing key, or a value of the wrong type, naming file and key.
    """
    content = read_yaml(path) if path else {}
    content.update({key: value for key, value in flags.items() if value is not None})
    return build(kind, content, path or "the command line")


def build(kind: type[T], content: dict[str, Any], where: str) -> T:
    """A dataclass from a mapping; see :func:`load`."""
    if kind is Policy:
        content = _nest_sampling(content)
    if kind is ScorerConfig:
        content = _nest_options(content)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)  # annotations are texts in these modules
    for key in content:
        if key not in fields:
            flat = {f.name for f in dataclasses.fields(SamplingParams)} if kind is Policy else set()
            raise InputError(f"{where}: unknown key {key!r}{did_you_mean(str(key), [*fields, *sorted(flat)])}")
    values = {key: convert(hints[key], value, f"{where}: {key}") for key, value in content.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise InputError(f"{where}: {name} is missing")
    return kind(**values)


def _nest_sampling(content: dict[str, Any]) -> dict[str, Any]:
    """Sampling settings stand flat beside a policy's other keys; put them where the dataclass has them."""
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    if "sampling" in content:
        return content
    flat = {key: value for key, value in content.items() if key not in names}
    return {**flat, "sampling": {key: value for key, value in content.items() if key in names}}


def _nest_options(content: dict[str, Any]) -> dict[str, Any]:
    if "options" in content:
        return content
    options = {key: value for key, value in content.items() if key not in ("name", "kind")}
    return {**{key: value for key, value in content.items() if key in ("name", "kind")}, "options": options}


def convert(hint: Any, value: Any, where: str) -> Any:
    """``value`` as type ``hint``; whole numbers pass as floats and nothing else is bent."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return convert(next(arg for arg in args if arg is not type(None)), value, where)
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise InputError(f"{where}: expected a list")
        return origin(convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise InputError(f"{where}: expected a mapping")
        return build(typing.cast(type, hint), value, where)
    return _scalar(origin or hint, value, where)


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-5 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if kind is Any or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    raise InputError(f"{where}: expected {kind.__name__}, found {value!r}")


def resolve_near(path: str, config: str | None) -> str:
    """A path in a config: as it is if it exists, else beside the config file, else unchanged for the error message."""
    if config and not is_there(path) and is_there(Path(config).parent / path):
        return str(Path(config).parent / path)
    return path

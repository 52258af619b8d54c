"""Scores by a Python function of the user's, called the way trlX calls a ``reward_fn``."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from rankalign.data.records import CandidateSet, Prompt, Response
from rankalign.data.templates import render
from rankalign.errors import InputError
from rankalign.registry import did_you_mean
from rankalign.scorers import Explanation
from rankalign.storage.files import sha256_file

_Kind = inspect.Parameter
_POSITIONAL = (_Kind.POSITIONAL_ONLY, _Kind.POSITIONAL_OR_KEYWORD, _Kind.VAR_POSITIONAL)
Sample = tuple[CandidateSet, str, str]  # record, who answered, the answer
_NAMED = (_Kind.POSITIONAL_OR_KEYWORD, _Kind.KEYWORD_ONLY)


class FunctionScorer:
    """Calls a function with all responses at hand, and takes a number for each.

    The function declares what it wants; its first parameter, whatever its name, gets the samples unless it is one of
    the names below::

        reward_fn(samples) -> list[float]
        reward_fn(samples, prompts, outputs, **metadata) -> list[float]

    ``samples`` are prompt and response as one text, ``prompts`` and ``outputs`` its two parts, ``tokenizer`` is that of
    the policy in PPO and else None. A parameter called ``policies`` gets the name of who wrote each response.
    Metadata is each option of the scorer as it stands, and each key of the records' ``meta`` as a list with one entry a
    sample (None where a record lacks it). A chat counts as its messages' texts with blank lines between.

    For each sample the function returns a number, None for no score, a list of numbers, one a token, which are summed,
    or sub-scores ``{axis: number}``, which are summed and kept. Tensors and arrays will do for lists.

    Args:
        name: key of the scores.
        function: ``module:name``, ``path/file.py:name``, or the function itself.
        metadata: options handed to the function.

    Raises:
        InputError: there is no such function, it cannot be imported, or it takes no such option.
    """

    def __init__(self, name: str, function: str | Callable[..., Any], **metadata: Any) -> None:
        self.name, self.metadata = name, metadata
        self.spec = function if isinstance(function, str) else _spec_of(function)
        self.tokenizer: Any = None
        self._values: list[list[Any]] = []
        self._where = f"scorer {name!r}: function {self.spec}"
        given = None if isinstance(function, str) else (function, _file_of(function))
        self._function, self._file = given or _load(self.spec, self._where)
        try:
            parameters = inspect.signature(self._function).parameters.values()
        except ValueError:  # some that are built in do not say what they take
            raise InputError(f"{self._where} does not say what it takes; call it from a function of your own") from None
        self._first = next((p.name for p in parameters if p.kind in _POSITIONAL), "")
        self._names = [p.name for p in parameters if p.kind in _NAMED]
        self._keywords = any(p.kind is p.VAR_KEYWORD for p in parameters)
        for option in metadata:
            if option not in self._names and not self._keywords:
                raise InputError(f"{self._where} takes no option {option!r}{did_you_mean(option, self._names)}")

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """One score a response.

        Raises:
            InputError: the function raised, or did not return one finite number a sample.
        """
        found = self.token_scores(sets)
        return [[float(sum(s)) if isinstance(s, list) else s for s in row] for row in found]

    def token_scores(self, sets: Sequence[CandidateSet]) -> list[list[float | list[float] | None]]:
        """As :meth:`score`, but a list of numbers for a response comes back as it is."""
        samples = [(r, response.policy, _output(response)) for r in sets for response in r.responses]
        values = _plain(self._call(samples)) if samples else []
        if not isinstance(values, list | tuple) or len(values) != len(samples):
            found = len(values) if isinstance(values, list | tuple) else f"a {type(values).__name__}"
            raise InputError(f"{self._where} must return a list of {len(samples)} scores, not {found}")
        returned = iter(values)
        self._values = [[_plain(next(returned)) for _ in record.responses] for record in sets]
        return [
            [self._number(value, record.id) for value in row] for row, record in zip(self._values, sets, strict=True)
        ]

    def explain(self) -> list[Explanation]:
        """The sub-scores of each response of the last batch."""
        return [
            Explanation({}, [{"ratings": _numbers(value)} if isinstance(value, dict) else {} for value in row])
            for row in self._values
        ]

    def fingerprint(self) -> dict[str, Any]:
        """Function, options, and the hash of the file it was taken from; what that file imports does not count.

        A function typed into a notebook or a shell lies in no file: its own source counts, or its compiled code.

        Raises:
            InputError: it is neither in a file nor a plain function, so that nothing says what it computes.
        """
        code = sha256_file(self._file) if self._file else _code_of(self._function, self._where)
        bound = {"bound": repr(_bound(self._function))} if isinstance(self._function, functools.partial) else {}
        return {"kind": "function", "function": self.spec, "options": self.metadata, "sha256": code, **bound}

    def _call(self, samples: Sequence[Sample]) -> Any:
        positional, keywords = self._arguments(samples)
        try:
            inspect.signature(self._function).bind(*positional, **keywords)
        except TypeError as error:
            raise InputError(f"{self._where}: {error}, and neither options nor meta of the records have it") from None
        try:
            return self._function(*positional, **keywords)
        except InputError:
            raise
        except Exception as error:  # the function is the user's: it may raise anything, and its message is for the user
            raise InputError(f"{self._where} raised {type(error).__name__}: {error}") from error

    def _arguments(self, samples: Sequence[Sample]) -> tuple[list[Any], dict[str, Any]]:
        keys = dict.fromkeys(key for record, _, _ in samples for key in record.meta)
        given = {key: [record.meta.get(key) for record, _, _ in samples] for key in keys} | self.metadata
        if "policies" in self._names:  # and not among what others take as it comes
            given["policies"] = [policy for _, policy, _ in samples]
        given |= {  # these names are ours, also where a record's meta has them
            "samples": [_text(record.prompt, output) for record, _, output in samples],
            "prompts": [_text(record.prompt) for record, _, _ in samples],
            "outputs": [output for _, _, output in samples],
            "tokenizer": self.tokenizer,
        }
        positional = [given.pop("samples")] if self._first and self._first not in given else []
        return positional, {key: value for key, value in given.items() if self._keywords or key in self._names}

    def _number(self, value: Any, ident: str) -> float | list[float] | None:
        if value is None:
            return None
        each = list(value.values()) if isinstance(value, dict) else value
        parts = [_plain(part) for part in each] if isinstance(each, list | tuple) else [each]
        whole = all(isinstance(part, int | float) and not isinstance(part, bool) for part in parts)
        if not whole or value == {}:
            raise InputError(f"{self._where} returned {value!r:.60} for a response to {ident!r}: not a number")
        if not math.isfinite(total := float(sum(parts))):
            raise InputError(f"{self._where} returned {total} for a response to {ident!r}: not finite")
        return [float(part) for part in parts] if isinstance(value, list | tuple) else total


def _output(response: Response) -> str:
    """What a function is given as the answer: its text as it is, or all of its messages in lines."""
    return response.text if response.messages is None else response.shown(thoughts=True)


def _numbers(ratings: dict[Any, Any]) -> dict[str, float]:
    return {str(axis): float(_plain(value)) for axis, value in ratings.items()}


def _plain(value: Any) -> Any:
    """Lists and numbers out of tensors and arrays."""
    return value.tolist() if hasattr(value, "tolist") else value


def _text(prompt: Prompt, output: str | None = None) -> str:
    """The prompt's text, followed by the response if one is given."""
    if isinstance(prompt, str):
        return prompt + (output or "")
    answer = [] if output is None else [{"role": "assistant", "content": output}]
    return render([*prompt, *answer], "raw")


def _bound(function: Any) -> list[Any]:
    """The arguments that ``partial`` has given a function, the innermost last."""
    if not isinstance(function, functools.partial):
        return []
    return [function.args, sorted(function.keywords.items()), *_bound(function.func)]


def _spec_of(function: Callable[..., Any]) -> str:
    """``module:name`` of a function, also inside ``partial``; of an object that can be called that of its class."""
    if isinstance(function, functools.partial):
        return _spec_of(function.func)
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def _file_of(function: Callable[..., Any]) -> str | None:
    """The file that holds the function; None for one typed at a prompt, whose file is a name such as ``<stdin>``."""
    try:
        found = inspect.getsourcefile(_unwrapped(function))
    except TypeError:
        return None
    return found if found and Path(found).is_file() else None


def _unwrapped(function: Callable[..., Any]) -> Any:
    """What was written down: the function inside decorators and ``partial``, or the class of an object."""
    inner = inspect.unwrap(function)
    while isinstance(inner, functools.partial):
        inner = inspect.unwrap(inner.func)
    return inner if inspect.isroutine(inner) or inspect.isclass(inner) else type(inner)


def _code_of(function: Callable[..., Any], where: str) -> str:
    """Hash of a function's source, or where that is not kept, of its instructions with their constants."""
    inner = _unwrapped(function)
    try:
        return hashlib.sha256(inspect.getsource(inner).encode()).hexdigest()
    except (OSError, TypeError):
        pass
    called = vars(inner).get("__call__") if inspect.isclass(inner) else inner
    code = getattr(getattr(called, "__func__", called), "__code__", None)
    if code is None:
        raise InputError(f"{where}: lies in no file and has no Python code, so no run can name it; put it into a file")
    return hashlib.sha256(_instructions(code).encode()).hexdigest()


def _instructions(code: CodeType) -> str:
    inner = [_constant(each) for each in code.co_consts]
    return repr((code.co_code.hex(), inner, code.co_names, code.co_varnames, code.co_freevars))


def _constant(value: Any) -> str:
    if isinstance(value, CodeType):
        return _instructions(value)
    # The order of a set of texts is another in every process.
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _load(spec: str, where: str) -> tuple[Callable[..., Any], str | None]:
    """The function behind ``module:name`` or ``path/file.py:name``, and the file it lies in."""
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise InputError(f"{where}: write module:name or path/file.py:name")
    try:
        module = _from_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except InputError:
        raise
    except Exception as error:  # importing runs the user's code
        raise InputError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        defined = [key for key, value in vars(module).items() if callable(value)]
        raise InputError(f"{where}: {source} has no {name!r}{did_you_mean(name, defined)}")
    function = getattr(module, name)
    if not callable(function):
        raise InputError(f"{where}: is no function but a {type(function).__name__}")
    return function, module.__file__


def _from_file(path: Path) -> ModuleType:
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]  # two files may have one name
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{digest}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InputError(f"{path}: no such file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module

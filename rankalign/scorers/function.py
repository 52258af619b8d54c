"""Scores by a Python function of the user's, called the way trlX calls a ``reward_fn``."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from rankalign.data.records import CandidateSet, Prompt, Response
from rankalign.data.templates import render
from rankalign.errors import InputError
from rankalign.registry import did_you_mean
from rankalign.scorers import Explanation
from rankalign.storage.code import as_input_error, code_hash, file_of, load_code, spec_of

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
        self.spec = function if isinstance(function, str) else spec_of(function)
        self.tokenizer: Any = None
        self._values: list[list[Any]] = []
        self._where = f"scorer {name!r}: function {self.spec}"
        given = None if isinstance(function, str) else (function, file_of(function))
        self._function, self._file = given or load_code(self.spec, self._where)
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
        code = code_hash(self._function, self._file, self._where)
        bound = {"bound": repr(_bound(self._function))} if isinstance(self._function, functools.partial) else {}
        return {"kind": "function", "function": self.spec, "options": self.metadata, "sha256": code, **bound}

    def _call(self, samples: Sequence[Sample]) -> Any:
        positional, keywords = self._arguments(samples)
        try:
            inspect.signature(self._function).bind(*positional, **keywords)
        except TypeError as error:
            raise InputError(f"{self._where}: {error}, and neither options nor meta of the records have it") from None
        with as_input_error(self._where):
            return self._function(*positional, **keywords)

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

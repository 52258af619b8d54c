"""Functions and classes of the user's own: named ``module:name`` or ``path/file.py:name``, imported, and told apart by
their source."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from rankalign.errors import InputError
from rankalign.registry import Registry, did_you_mean
from rankalign.storage.files import sha256_file

# Handed over in this process under the names that settings have for them.
_GIVEN: dict[str, Callable[..., Any]] = {}
# Where code lies that is not the user's: ours, the packages', Python's.
_OTHERS = (str(Path(__file__).parents[1]), *map(sysconfig.get_path, ("purelib", "platlib", "stdlib")))
# By file and content: a file that changes under a notebook is read again, one that does not runs once.
_MODULES: dict[tuple[Path, str], ModuleType] = {}


def is_code(name: str) -> bool:
    """Whether a name stands for code of the user's and not for an entry of a registry, which has no colon in it."""
    return ":" in name


def find(registry: Registry, name: str) -> Any:
    """What ``name`` stands for: an entry of the registry, or code of the user's own.

    Raises:
        InputError: there is no such thing.
    """
    return load_code(name, f"{registry.what} {name}")[0] if is_code(name) else registry.load(name)


def remember(function: Callable[..., Any]) -> str:
    """A name under which :func:`load_code` finds a function that was handed over as it is."""
    name = spec_of(function)
    _GIVEN[name] = function
    return name


def hash_of(spec: str) -> str:
    """SHA-256 of the code behind a name, as part of a run's identity. What its file imports does not count.

    Raises:
        InputError: there is none.
    """
    return code_hash(*load_code(spec, spec), spec)


@contextlib.contextmanager
def as_input_error(where: str) -> Iterator[None]:
    """Whatever code of the user's raises, as an :class:`InputError` that names it and the line.

    Args:
        where: what was called, such as ``loss 'my_losses.py:fn'``.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the code is the user's: it may raise anything, and its message is for the user
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not frame.filename.startswith(_OTHERS)]
        at = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
        raise InputError(f"{where} raised {type(error).__name__}: {error}{at}") from error


def spec_of(function: Callable[..., Any]) -> str:
    """``module:name`` of a function, also inside ``partial``; of an object that can be called that of its class."""
    if isinstance(function, functools.partial):
        return spec_of(function.func)
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def file_of(function: Callable[..., Any]) -> str | None:
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


def code_hash(function: Callable[..., Any], file: str | None, where: str) -> str:
    """SHA-256 of the file that holds a function; of one that lies in none, of its source, or where that is not kept,
    of its instructions with their constants.

    Raises:
        InputError: it is neither in a file nor a plain function, so that nothing says what it computes.
    """
    if file:
        return sha256_file(file)
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


def load_code(spec: str, where: str) -> tuple[Callable[..., Any], str | None]:
    """The function or class behind ``module:name`` or ``path/file.py:name``, and the file it lies in.

    Raises:
        InputError: there is none, or importing it fails; ``where`` begins the message.
    """
    if spec in _GIVEN:
        return _GIVEN[spec], file_of(_GIVEN[spec])
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
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    key = path.resolve(), sha256_file(path)
    if key not in _MODULES:
        _MODULES[key] = _executed(path.resolve())
    return _MODULES[key]


def _executed(path: Path) -> ModuleType:
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]  # two files may have one name
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{digest}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: no file of Python code")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module

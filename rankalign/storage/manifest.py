"""The manifest of a finished stage: what went in, with which settings and versions, and what came out. Written last."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rankalign
from rankalign.errors import InputError
from rankalign.storage.files import sha256_file, write_text
from rankalign.storage.journal import differences
from rankalign.storage.jsonl import dumps, loads
from rankalign.storage.sources import shards

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "safetensors", "tokenizers", "numpy")


def path_for(output: str | os.PathLike[str]) -> Path:
    """``DIR/manifest.json`` for a folder, ``FILE.manifest.json`` for a file."""
    target = Path(output)
    return target / "manifest.json" if target.is_dir() else target.with_name(target.name + ".manifest.json")


def hashes(paths: Sequence[str | os.PathLike[str]]) -> dict[str, str]:
    """SHA-256 by path; of a folder, each file in it but its manifest; of a pattern, each file that it names."""
    found: dict[str, str] = {}
    for path in map(Path, paths):
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
        if not path.is_dir():
            files = [path] if path.exists() else shards(path) or [path]
        found.update({str(p): sha256_file(p) for p in files if p.name != "manifest.json"})
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"rankalign": rankalign.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(
    output: str | os.PathLike[str],
    stage: str,
    settings: dict[str, Any],
    inputs: Sequence[str | os.PathLike[str]],
    outputs: Sequence[str | os.PathLike[str]],
    **facts: Any,
) -> Path:
    """Write the manifest of ``output``; call it after everything else is on disk.

    Args:
        output: file or folder the manifest belongs to.
        stage: name of the stage.
        settings: everything the result depends on, resolved.
        inputs: files or folders read.
        outputs: files or folders written, hashed for ``verify``.
        **facts: counts, metrics, seconds and whatever else describes the run.
    """
    content = {
        "stage": stage,
        "settings": settings,
        "inputs": hashes(inputs),
        "outputs": hashes(outputs),
        "versions": versions(),
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        **facts,
    }
    target = path_for(output)
    write_text(target, dumps(content) + "\n")
    return target


def read(output: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest of ``output``, or None where there is none: that stage is not finished."""
    try:
        return dict(loads(path_for(output).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path_for(output)}: {error}; delete it to run the stage again") from None


def is_finished(output: str | os.PathLike[str], settings: dict[str, Any]) -> bool:
    """Whether ``output`` was made with just these settings and is unchanged since.

    Raises:
        InputError: it is there but was made with other settings, or was changed afterwards.
    """
    found = read(output) if Path(output).exists() else None
    if found is None:
        return False
    if changed := differences(found["settings"], loads(dumps(settings))):
        raise InputError(
            f"{output} was made with other settings ({'; '.join(changed[:4])}); "
            "name another output or replace it with --overwrite"
        )
    for entry in changed_files({"inputs": {}, "outputs": found["outputs"]}):
        raise InputError(f"{entry['path']} {entry['reason']} since it was made; replace it with --overwrite")
    return True


def changed_files(content: dict[str, Any]) -> list[dict[str, str]]:
    """Files of a manifest whose bytes are not what they were, as ``{"path", "role", "reason"}``."""
    found = []
    for role in ("inputs", "outputs"):
        for path, digest in content[role].items():
            there = Path(path).is_file()
            if not there or sha256_file(path) != digest:
                found.append({"path": path, "role": role[:-1], "reason": "has changed" if there else "is gone"})
    return found

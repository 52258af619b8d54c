"""Publishes a trained folder on the hub: weights, tokenizer, configuration and card, and nothing else."""

from __future__ import annotations

import fnmatch
import os
import re
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from rankalign.errors import InputError
from rankalign.storage import manifest

# What loading a model takes, and its card. Whatever is not named stays here: checkpoints with the optimiser's state,
# logs, journals and ledgers with texts, manifests with paths of this machine, pickles.
ALLOWED = (
    "README.md", "LICENSE*",
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "adapter_model.safetensors", "adapter_config.json",
    "config.json", "generation_config.json", "chat_template.jinja",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
WEIGHTS = ("*.safetensors",)
# Keys of the hub and of the usual servers, as they begin.
_KEY = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16})")
_READ = (".md", ".json", ".jinja")
_LARGE = 1 << 20  # bytes: a vocabulary; texts that people write are shorter


def push(folder: str | os.PathLike[str], repo: str, private: bool = False, token: str | None = None) -> dict[str, Any]:
    """Create the repository where it is not there, and put the folder's files into it in one commit.

    Args:
        folder: a finished run's, or any that holds a model.
        repo: ``name`` or ``organisation/name``.
        private: whether a new repository is; one that is there stays what it is.
        token: of the hub; None takes the one that ``hf auth login`` or ``HF_TOKEN`` left.

    Returns:
        ``{"repo", "url", "files", "bytes", "left"}``: what was sent, and the names that were not.

    Raises:
        InputError: the run is not finished, the folder holds no weights or what looks like a key, or the hub refuses.
    """
    place = Path(folder)
    files, left = chosen(place)
    check_name(repo)
    print("pushing: " + ", ".join(files), file=sys.stderr)
    print(f"not pushed: {', '.join(left) or 'nothing'}", file=sys.stderr)
    api = _api(token)
    try:
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        done = api.upload_folder(
            folder_path=place,
            repo_id=made.repo_id,
            allow_patterns=list(files),
            commit_message="Upload by rankalign",
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError, OSError, ValueError) as error:
        raise _refused(repo, error) from None
    size = sum((place / name).stat().st_size for name in files)
    return {"repo": made.repo_id, "url": str(done.commit_url), "files": list(files), "bytes": size, "left": left}


def chosen(folder: Path) -> tuple[list[str], list[str]]:
    """The names of a folder that may be pushed, and those that may not.

    Raises:
        InputError: nothing to push, a run that is not finished, or a file with what looks like a key.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    names = sorted(path.name for path in folder.iterdir())
    files = [name for name in names if _allowed(folder / name)]
    if any(name.startswith("checkpoint-") for name in names) and manifest.read(folder) is None:
        raise InputError(f"{folder}: the run is not finished; the same `rankalign train` goes on with it")
    if not any(fnmatch.fnmatch(name, pattern) for name in files for pattern in WEIGHTS):
        raise InputError(f"{folder}: holds no weights (*.safetensors) to push")
    for name in files:
        path = folder / name
        if path.suffix in _READ and path.stat().st_size < _LARGE and _KEY.search(path.read_text("utf-8", "replace")):
            raise InputError(f"{path}: holds what looks like a secret key; take it out, and withdraw the key")
    return files, [name for name in names if name not in files]


def _allowed(path: Path) -> bool:
    """A link is never followed: it may name anything."""
    whole = path.is_file() and not path.is_symlink()
    return whole and any(fnmatch.fnmatch(path.name, pattern) for pattern in ALLOWED)


def check_name(repo: str) -> None:
    """Refuse what cannot name a repository.

    Raises:
        InputError: with the hub's reason.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo}: cannot be the name of a repository: {' '.join(str(error).split())}") from None


def check_login(token: str | None = None) -> None:
    """Ask the hub who we are, so that a run of hours does not end before a closed door.

    Raises:
        InputError: nobody, or the hub cannot be reached.
    """
    try:
        _api(token).whoami()
    except (HfHubHTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError, OSError, ValueError) as error:
        raise _refused("--push_to_hub", error) from None


def _api(token: str | None) -> HfApi:
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)


def _refused(what: str, error: Exception) -> InputError:
    code = getattr(getattr(error, "response", None), "status_code", None)
    login = "; log in with `hf auth login`, or set HF_TOKEN to a token that may write" if code in (401, 403) else ""
    login = login or ("; log in with `hf auth login`" if isinstance(error, LocalTokenNotFoundError) else "")
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return InputError(f"{what}: the hub refused: {_KEY.sub('(key)', said)}{login}")

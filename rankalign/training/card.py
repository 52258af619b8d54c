"""The model card that every trained folder carries: what it is, from what, how it was made, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import rankalign
from rankalign.storage.files import write_text

NAME = "README.md"
BUILT_IN = {"default": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # what hubs know the embedded model as
LOADERS = {
    "model": "AutoModelForCausalLM.from_pretrained(folder)",
    "reward": "AutoModelForSequenceClassification.from_pretrained(folder)  # one output: the reward",
    "adapter": "AutoPeftModelForCausalLM.from_pretrained(folder)  # from peft, on the base model named above",
}


def write_card(
    output: Path, method: str, model: str, data: str, settings: Mapping[str, Any], facts: Mapping[str, Any]
) -> Path:
    """Write ``README.md`` into a trained folder. Paths are cut to their last part: a card is made to be shared.

    Args:
        output: the folder, its weights already in it.
        method: as in ``rankalign train --method``.
        model: the start model.
        data: the training data.
        settings: what decided the result.
        facts: ``steps``, ``counts`` and ``metrics`` of the run.
    """
    base = Path(model).name if Path(model).exists() else BUILT_IN.get(model, model)
    path = output / NAME
    write_text(path, "\n".join([_head(base, method, settings), *_body(output, method, base, data, settings, facts)]))
    return path


def _head(base: str, method: str, settings: Mapping[str, Any]) -> str:
    tags = ["rankalign", method, *([str(settings["loss"])] if "loss" in settings else [])]
    head = {"base_model": base, "library_name": "transformers", "tags": list(dict.fromkeys(tags))}
    return f"---\n{yaml.safe_dump(head, allow_unicode=True)}---\n"


def _body(
    output: Path, method: str, base: str, data: str, settings: Mapping[str, Any], facts: Mapping[str, Any]
) -> list[str]:
    adapter = (output / "adapter_config.json").is_file()
    loader = LOADERS["adapter" if adapter else "reward" if method == "reward" else "model"]
    what = {"reward": "A reward model", "ppo": "A policy trained with PPO", "sft": "A supervised fine-tune"}
    title = what.get(method, f"A policy trained with the rank loss `{settings.get('loss', '')}`")
    return [
        f"# {_plain(output.name)}",
        "",
        f"{title}, from `{_plain(base)}` on `{_plain(Path(data).name)}`, by rankalign {rankalign.__version__}.",
        "`manifest.json` has every setting, the versions, and the hashes of what was read and written;",
        "`rankalign verify` checks them.",
        "",
        "```python",
        loader,
        "```",
        "",
        *_table("Data", facts.get("counts", {})),
        *_table("Training", {"updates": facts.get("steps"), **_changed(settings)}),
        *_table("At the end", facts.get("metrics", {})),
    ]


def _changed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that fit in a cell and say something."""
    return {
        name: value
        for name, value in settings.items()
        if value not in ("", None, [], {}) and not isinstance(value, dict | list) and "sha256" not in name
        and name not in ("model", "data", "eval_data")
    }  # fmt: skip


def _table(title: str, values: Mapping[str, Any]) -> list[str]:
    shown = {name: value for name, value in values.items() if isinstance(value, str | int | float)}
    if not shown:
        return []
    rows = [f"| {_plain(name)} | {_plain(_short(value))} |" for name, value in shown.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *rows, ""]


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(Path(value).name if _is_path(value) else value)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and "/" in value and Path(value).exists()


def _plain(text: str) -> str:
    """Text of the user in one cell: no markup of its own, no line break."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")

"""The model card that every trained folder carries: what it is, from what, how it was made, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

import rankalign
from rankalign.data.specs import parse
from rankalign.storage.files import write_text
from rankalign.storage.sources import ENDINGS, is_there

NAME = "README.md"
BUILT_IN = {"default": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # what hubs know the embedded model as
RESULTS = ("ranking_accuracy", "reward_accuracy", "margin", "loss", "win_rate", "rouge1", "rouge2", "rougeL")
"""Figures of held-out data that stand in a card's metadata."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
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
        data: the training data, as it was asked for.
        settings: what decided the result.
        facts: ``steps``, ``counts`` and ``metrics`` of the run, and ``evaluation`` where something was measured.
    """
    base = Path(model).name if Path(model).exists() else BUILT_IN.get(model, model)
    sets = _data_sets(data)
    head = _head(output, method, base, sets, settings, facts.get("evaluation") or {})
    path = output / NAME
    write_text(path, "\n".join([head, *_body(output, method, base, sets, settings, facts)]))
    return path


def _data_sets(data: str) -> list[str]:
    """The names of ``--data``: hub ids whole, of paths the last part."""
    paths = [part.path for part in parse(data)] if data else []
    return list(dict.fromkeys(path if _on_hub(path) else Path(path).name for path in paths))


def _on_hub(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(ENDINGS) and not is_there(name)


def _head(
    output: Path, method: str, base: str, sets: Sequence[str], settings: Mapping[str, Any], measured: Mapping[str, Any]
) -> str:
    """The metadata that hubs read: links to base and data sets that a hub has, and what was measured."""
    on_hub = {"datasets": [name for name in sets if _on_hub(name)]}
    if _HUB_ID.fullmatch(base):
        relation = "adapter" if (output / "adapter_config.json").is_file() else "finetune"
        on_hub |= {"base_model": base, "base_model_relation": relation}  # type: ignore[dict-item]
    tags = ["rankalign", method, *([str(settings["loss"]).rpartition("/")[2]] if "loss" in settings else [])]
    results = [
        EvalResult(
            task_type="text-classification" if method == "reward" else "text-generation",
            dataset_type=sets[0] if sets else "unknown",
            dataset_name=f"held-out part of {', '.join(sets) or 'the data'}",
            metric_type=name,
            metric_value=value,
            metric_name=name.replace("_", " "),
        )
        for name, value in measured.items()
        if name in RESULTS and isinstance(value, int | float)
    ]
    given = {name: value for name, value in on_hub.items() if value}
    of_model = {"model_name": _plain(output.name), "eval_results": results} if results else {}
    head = ModelCardData(library_name="transformers", tags=list(dict.fromkeys(tags)), **given, **of_model)  # type: ignore[arg-type]
    return f"---\n{head.to_yaml()}\n---\n"


def _body(
    output: Path, method: str, base: str, sets: Sequence[str], settings: Mapping[str, Any], facts: Mapping[str, Any]
) -> list[str]:
    adapter = (output / "adapter_config.json").is_file()
    loader = LOADERS["adapter" if adapter else "reward" if method == "reward" else "model"]
    what = {"reward": "A reward model", "ppo": "A policy trained with PPO", "sft": "A supervised fine-tune"}
    title = what.get(method, f"A policy trained with the rank loss `{settings.get('loss', '')}`")
    return [
        f"# {_plain(output.name)}",
        "",
        f"{title}, from `{_plain(base)}` on `{_plain(', '.join(sets))}`, by rankalign {rankalign.__version__}.",
        "In the run's folder `manifest.json` has every setting, the versions, and the hashes of what was read and",
        "written; `rankalign verify` checks them.",
        "",
        "```python",
        loader,
        "```",
        "",
        *_table("Data", facts.get("counts", {})),
        *_table("Training", {"updates": facts.get("steps"), **_changed(settings)}),
        *_table("At the end", facts.get("metrics", {})),
        *_table("On held-out data", facts.get("evaluation", {})),
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

"""What ``--data`` and ``--eval_data`` name, as paths: splits, parts, mixtures and hub ids are made files first."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState

from rankalign.data.specs import held_out, is_mixture, located
from rankalign.models import load as models
from rankalign.training.arguments import TrainConfig

READS = ("model", "data", "eval_data", "resume_from_checkpoint", "reward", "value_model")


def read_by(config: TrainConfig) -> dict[str, str]:
    """What a run reads, by flag, as its user wrote it."""
    return {f"--{name}": str(text) for name in READS if (text := getattr(config, name, None))}


def locate(config: TrainConfig) -> None:
    """Put paths in the place of what ``config`` names; where they are already, nothing changes.

    Raises:
        InputError: a data set is neither here nor to be had.
    """
    cache = models.cache_dir()

    def reading() -> dict[str, Any]:
        return {
            "from_format": config.format,
            "skip_invalid": config.skip_invalid,
            "ignore_columns": config.ignore_columns,
        }

    with PartialState().main_process_first():  # one fetches and mixes, the others find it done
        sets = {name: text for name in ("data", "eval_data") if (text := getattr(config, name))}
        paths = {name: located(text, cache, **reading()) for name, text in sets.items()}
        if any(is_mixture(path, cache) for path in paths.values()):
            # One setting names the format of both, and a mixture is of our records: the other one becomes that too.
            if config.format != "auto":
                paths = {name: located(path, cache, as_records=True, **reading()) for name, path in paths.items()}
            config.format = "auto"
        for name, path in paths.items():
            setattr(config, name, path)
        if config.eval_split:
            config.data, config.eval_data = held_out(config.data, config.eval_split, cache, **reading())
            config.eval_split = 0.0  # which records they are is in their bytes, and so in the identity
            config.format = "auto"

"""What ``--data`` and ``--eval_data`` name, as paths: splits, parts, mixtures and hub ids are made files first."""

from __future__ import annotations

from accelerate import PartialState

from rankalign.data.specs import held_out, located
from rankalign.models import load as models
from rankalign.training.arguments import TrainConfig


def locate(config: TrainConfig) -> None:
    """Put paths in the place of what ``config`` names; where they are already, nothing changes.

    Raises:
        InputError: a data set is neither here nor to be had.
    """
    cache = models.cache_dir()
    reading = {
        "from_format": config.format,
        "skip_invalid": config.skip_invalid,
        "ignore_columns": config.ignore_columns,
    }
    with PartialState().main_process_first():  # one fetches and mixes, the others find it done
        if config.data:
            config.data = located(config.data, cache, **reading)
        if config.eval_data:
            config.eval_data = located(config.eval_data, cache, **reading)
        if config.eval_split:
            config.data, config.eval_data = held_out(config.data, config.eval_split, cache, **reading)
            config.eval_split = 0.0  # which records they are is in their bytes, and so in the identity
        if config.data.startswith(str(cache / "mixed")):
            config.format = "auto"  # they are records of ours now

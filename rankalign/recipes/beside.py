"""A process that answers and grades beside the one that trains, on GPUs of its own where there are some left."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from rankalign.errors import InputError
from rankalign.recipes.rounds import Current, Gatherer, IterateConfig
from rankalign.stages.processes import end_with_parent
from rankalign.training.online import StartModel
from rankalign.training.settings import DataSettings

PATIENCE_S = 60.0
"""How long is waited for an answer at once; between two waits other processes may be told."""
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class Beside:
    """The process; it gathers one block after the other, and keeps what it has loaded.

    Args:
        config: settings of the run.
        encoding: how training encodes records.
        start: the start model.
    """

    def __init__(self, config: IterateConfig, encoding: DataSettings, start: StartModel) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._ours, theirs = spawn.Pipe()
        alone = dataclasses.replace(config, num_processes=0, launch="")
        told = (theirs, alone, encoding, start.name, start.below_adapter, _own_cards())
        self._process = spawn.Process(target=_serve, args=told)
        self._process.start()
        theirs.close()
        self._finished: set[int] = set()

    def ask(self, folder: Path, now: Current, prompts: str) -> None:
        """Have a block's candidates made in ``folder``; arguments as for :meth:`Gatherer.gather`."""
        self._ours.send((folder, now, prompts))

    def done(self, number: int) -> bool:
        """Whether a block is made; waits for a while.

        Raises:
            InputError: what the process has to say, or that it died.
        """
        try:
            if number not in self._finished and self._ours.poll(PATIENCE_S):
                made, error = self._ours.recv()
                if error:
                    raise InputError(error)
                self._finished.add(made)
        except (EOFError, ConnectionResetError):
            raise InputError("the process that answers has died, perhaps for want of memory; try --async 0") from None
        return number in self._finished

    def close(self) -> None:
        """End it, whatever it is at: what was finished lies in journals."""
        self._process.kill()
        self._process.join()
        self._ours.close()


def _own_cards() -> str:
    """The GPUs that no process trains on, as ``CUDA_VISIBLE_DEVICES`` names them; all, where none is left."""
    seen = torch.cuda.device_count()
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = (names or [str(i) for i in range(seen)])[:seen]
    return ",".join(names[PartialState().num_processes :] or names)


def _serve(
    theirs: Connection, config: IterateConfig, encoding: DataSettings, start: str, below_adapter: bool, cards: str
) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    for name in LAUNCHERS:  # it is none of those that train one model
        os.environ.pop(name, None)
    if cards:
        os.environ["CUDA_VISIBLE_DEVICES"] = cards
    gatherer: Any = None
    while True:
        folder, now, prompts = theirs.recv()
        try:
            gatherer = gatherer or Gatherer(config, encoding, StartModel(start, below_adapter), lasting=True)
            gatherer.gather(folder, now, prompts)
            theirs.send((now.number, ""))
        except InputError as error:
            theirs.send((now.number, str(error)))
        except Exception as error:
            theirs.send((now.number, f"the process that answers failed: {type(error).__name__}: {error}"))
            raise
        sys.stderr.flush()

"""Who answers the blocks of an online run: the weights that train, between updates, or a process beside them, ahead."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankalign.data.records import CandidateSet, write
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.recipes.beside import Beside
from rankalign.recipes.rounds import Current, Gatherer, IterateConfig
from rankalign.stages import ranks
from rankalign.storage import manifest
from rankalign.storage.files import read_text, write_text
from rankalign.storage.folders import new_folder
from rankalign.storage.jsonl import dumps, loads
from rankalign.training.online import Answered, Block
from rankalign.training.processes import is_first


def round_folder(config: IterateConfig, number: int) -> Path:
    """Where a round's files lie."""
    return Path(config.output) / f"round-{number}"


def announce(text: str) -> None:
    """Say what begins."""
    print(f"\n== {text}", file=sys.stderr, flush=True)


class Refresher:
    """Answers a block's prompts with the weights in memory; see :data:`rankalign.training.online.Refresh`.

    Args:
        config: settings.
        prompts: all of them.
        gatherer: samples and scores.
    """

    def __init__(self, config: IterateConfig, prompts: Sequence[CandidateSet], gatherer: Gatherer) -> None:
        self.config, self.prompts, self.gatherer = config, prompts, gatherer

    def close(self) -> None:
        """Nothing is left open."""

    def path(self, block: Block) -> Path:
        """The file of a block's candidates."""
        return round_folder(self.config, block.number) / "candidates.jsonl"

    def __call__(self, model: Any, block: Block, fresh: bool) -> Answered:
        """The candidates, sampled now, or read where they are done.

        Raises:
            InputError: those of a block that is half learned are gone.
        """
        path = self.path(block)
        if not fresh:
            if manifest.read(path) is None:
                raise InputError(f"{path} is gone, of which the checkpoint has learned a part; start with --overwrite")
            return Answered(path)
        announce(f"round {block.number}: the weights of step {block.step} answer {len(block.prompts)} prompts")
        now = Current(block.number, block.step, models.weights_fingerprint(model), model=model)
        if is_first():
            self.lay_out(block, now.weights)
        return Answered(self.gatherer.gather(path.parent, now, str(path.with_name("prompts.jsonl"))))

    def lay_out(self, block: Block, weights: str) -> None:
        """Write a block's prompts, in a folder in which nothing of other weights is left: updates repeat bit by bit on
        a CPU, and on a GPU they may not."""
        folder = self.path(block).parent
        note = folder / "weights.json"
        if note.exists() and loads(read_text(note))["weights"] != weights:
            print(f"{folder}: written by other weights than those that this resume arrived at; anew", file=sys.stderr)
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(note, dumps({"weights": weights}) + "\n")
        write(folder / "prompts.jsonl", [self.prompts[i] for i in block.prompts])


class Ahead(Refresher):
    """Has the next block answered beside the training of one, in another process, by the weights that the training of
    this block begins with.

    Those weights are kept in the next block's folder until its answers are learned: a run killed at any time goes on
    with the same ones.

    Args:
        config: settings.
        prompts: all of them.
        gatherer: says how training encodes records and what the start model is; its like answers, in that process.
        blocks: all of them.
    """

    def __init__(
        self, config: IterateConfig, prompts: Sequence[CandidateSet], gatherer: Gatherer, blocks: Sequence[Block]
    ) -> None:
        super().__init__(config, prompts, gatherer)
        self.blocks = {block.number: block for block in blocks}
        self._beside: Beside | None = None
        self._asked: set[int] = set()

    def __call__(self, model: Any, block: Block, fresh: bool) -> Answered:
        """The candidates, once they are there; and the next block's are asked for.

        Raises:
            InputError: the process beside has failed, or weights that it needs are gone.
        """
        following, weights = self.blocks.get(block.number + 1), self._weights(block)
        if is_first() and fresh and block.number == 1:  # the weights of others were kept when the one before began
            self._keep(model, block)
        self._wait(block)
        if is_first():
            if block.number > 1:
                shutil.rmtree(self._weights(self.blocks[block.number - 1]), ignore_errors=True)
            if fresh and following is not None:
                self._keep(model, following)
            if following is not None:
                self._ask(following)
        # Of a block that is half learned, what its writer thought of it is kept already.
        return Answered(self.path(block), str(weights) if weights.exists() else "")

    def close(self) -> None:
        """End the process beside."""
        if self._beside is not None:
            self._beside.close()

    def _weights(self, block: Block) -> Path:
        return round_folder(self.config, block.number) / "weights"

    def _keep(self, model: Any, block: Block) -> None:
        """Put the weights of the moment where a block is answered from."""
        self.lay_out(block, models.weights_fingerprint(model))
        if manifest.read(self.path(block)) is None and not self._weights(block).exists():
            with new_folder(self._weights(block)) as fresh:
                model.save_pretrained(str(fresh))
                self.gatherer.tokenizer.save_pretrained(str(fresh))

    def _ask(self, block: Block) -> None:
        """Have a block answered, unless it is or will be."""
        path, weights = self.path(block), self._weights(block)
        if manifest.read(path) is not None or block.number in self._asked:
            return
        if not weights.exists():
            raise InputError(f"{weights} is gone, by which {path.parent} was to be answered; start with --overwrite")
        if self._beside is None:
            self._beside = Beside(self.config, self.gatherer.encoding, self.gatherer.start)
        what = f"the weights of step {block.written} answer {len(block.prompts)} prompts"
        announce(f"round {block.number}: {what}, beside the training")
        told = loads(read_text(path.with_name("weights.json")))["weights"]
        now = Current(block.number, block.written, told, folder=str(weights))
        self._beside.ask(path.parent, now, str(path.with_name("prompts.jsonl")))
        self._asked.add(block.number)

    def _wait(self, block: Block) -> None:
        """Wait until a block is answered."""
        team = self.gatherer.team
        if not is_first():
            ranks.follow(_nobody)
            return
        well = False
        try:
            self._ask(block)
            while block.number in self._asked and not (self._beside and self._beside.done(block.number)):
                if team:
                    ranks.tick()
            well = True
        finally:
            if team:
                ranks.dismiss(well)


def _nobody(key: str) -> Any:
    raise InputError(f"{key} was not to be asked for")

"""The memory that `rankalign plan` foresees, against what a real `rankalign train` process takes, over a grid.

Each cell is two commands, each in a process of its own: `plan`, and two updates of `train` with the same settings. The
models are the embedded default one, and one made here that is wide and shallow, so that a layer's tensors are large.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT, cpu_name, write_section
from benchmarks.stage import python, rankalign, run

WORDS = ["the", "of", "and", "to", "in", "is", "that", "for", "it", "was", "on", "are", "as", "with", "his", "they"]
PROMPTS = 4
LIMIT = 300.0  # seconds a command may take


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        model: ``default`` or ``wide``.
        method: ``full`` or ``lora``.
        checkpointing: whether layers run again in backward.
        layout: of the rows, ``tree`` or ``padded``.
        optimiser: ``adamw``, ``sgd`` or ``adafactor``.
        loss: ``rrhf``, ``dpo`` or ``sft``.
        candidates: answers a prompt.
        length: words of an answer; of the wide model letters.
    """

    model: str
    method: str
    checkpointing: bool
    layout: str
    optimiser: str
    loss: str
    candidates: int
    length: int

    @property
    def title(self) -> str:
        """As it stands in the table."""
        again = "checkpointed" if self.checkpointing else "kept"
        kinds = f"{self.model}, {self.method}, {again}, {self.layout}, {self.optimiser}, {self.loss}"
        return f"{kinds}, N={self.candidates}, {self.length}"

    def words(self, folder: Path) -> list[str]:
        """The settings of both commands."""
        method = ["--method=sft"] if self.loss == "sft" else [f"--loss={self.loss}"]
        optimiser = {"adamw": "adamw_torch"}.get(self.optimiser, self.optimiser)
        return [
            f"--model={'default' if self.model == 'default' else folder / 'wide'}",
            f"--data={data(folder, self)}",
            f"--output_dir={folder / 'run'}",
            *method,
            f"--use_lora={self.method == 'lora'}",
            f"--gradient_checkpointing={self.checkpointing}",
            f"--layout={self.layout}",
            f"--optim={optimiser}",
            "--max_length=1024",
            "--per_device_train_batch_size=1",
            "--gradient_accumulation_steps=1",
            "--max_steps=2",
            "--save_strategy=no",
            "--use_cpu=true",
            "--overwrite=true",
            "--disable_tqdm=true",
        ]


def _cells() -> list[Cell]:
    """Every value of each axis stands in at least three of them."""
    default = [
        ("full", False, "tree", "adamw", "rrhf", 2, 64),
        ("full", False, "tree", "adamw", "dpo", 8, 64),
        ("full", True, "tree", "adafactor", "rrhf", 4, 128),
        ("full", False, "padded", "sgd", "rrhf", 4, 64),
        ("lora", False, "tree", "adamw", "rrhf", 8, 64),
        ("lora", True, "tree", "adamw", "rrhf", 8, 128),
        ("lora", True, "padded", "sgd", "sft", 2, 256),
        ("lora", False, "padded", "adafactor", "dpo", 2, 128),
    ]
    wide = [
        ("full", False, "tree", "adamw", "rrhf", 4, 128),
        ("full", True, "padded", "sgd", "sft", 2, 256),
        ("full", False, "padded", "adafactor", "dpo", 2, 192),
        ("full", True, "tree", "adamw", "rrhf", 8, 256),
        ("full", False, "tree", "sgd", "sft", 2, 256),
        ("full", True, "padded", "adamw", "dpo", 4, 128),
        ("lora", False, "tree", "adamw", "dpo", 8, 256),
        ("lora", True, "tree", "adafactor", "rrhf", 8, 192),
        ("lora", False, "padded", "sgd", "sft", 4, 256),
        ("lora", True, "padded", "sgd", "rrhf", 4, 256),
        ("lora", False, "tree", "adafactor", "rrhf", 8, 128),
        ("lora", True, "tree", "adamw", "dpo", 4, 192),
    ]
    return [Cell("default", *cell) for cell in default] + [Cell("wide", *cell) for cell in wide]


CELLS = dict(enumerate(_cells(), 1))


def data(folder: Path, cell: Cell) -> Path:
    """Prompts with answers of nearly one length, so that what the shuffle draws is near the most it could."""
    draw = random.Random(0)
    words = WORDS if cell.model == "default" else "abcdefgh"

    def text(count: int) -> str:
        return ("" if cell.model == "wide" else " ").join(draw.choices(words, k=count))

    path = folder / "data.jsonl"
    with path.open("w") as out:
        for _ in range(PROMPTS):
            answers = [text(cell.length + draw.randint(-2, 2)) for _ in range(cell.candidates)]
            row = {"query": text(44), "responses": answers, "scores": list(range(cell.candidates))}
            out.write(json.dumps(row) + "\n")
    return path


def make_wide(folder: Path) -> None:
    """Three layers of width 1024, with the tokenizer of the tiny model, which has a token a letter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from rankalign.models import tiny

    tokenizer = tiny.build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Found:
    """What a cell gave, bytes of the whole process.

    Attributes:
        foreseen: the one figure of `plan`.
        low: the least that it says may be taken.
        high: the most.
        measured: resident at most, by `train`.
        cpu: seconds of user and system time of `train`.
    """

    foreseen: int
    low: int
    high: int
    measured: int
    cpu: float

    @property
    def verdict(self) -> str:
        """How near it came."""
        if abs(self.foreseen / self.measured - 1) <= 0.15:
            return "within 15 %"
        return "in the range" if self.low <= self.measured <= self.high else "**outside**"


def measure(cell: Cell, folder: Path) -> Found:
    log = folder / "log.txt"
    words = cell.words(folder)
    done = subprocess.run(rankalign("plan", "--json", *words), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode:
        raise SystemExit(f"plan of {cell.title}: {done.stderr.strip()[-500:]}")
    planned: dict[str, Any] = json.loads(done.stdout)
    cost = run(rankalign("train", *words), LIMIT, log)
    if cost.failed:
        raise SystemExit(f"train of {cell.title}: {cost.failed}: {log.read_text()[-500:]}")
    low, high = planned["peak_memory_range_bytes"]
    return Found(planned["peak_memory_bytes"], low, high, cost.peak, cost.cpu)


HEADER = (
    *("model, method, layers, layout, optimiser, loss, answers, words", "foreseen MiB", "from", "to", "measured"),
    *("foreseen / measured", "", "CPU s"),
)


def line_of(cell: Cell, found: Found) -> str:
    sizes = [f"{size / 2**20:.0f}" for size in (found.foreseen, found.low, found.high, found.measured)]
    ratio = f"{found.foreseen / found.measured:.2f}"
    return "| " + " | ".join([cell.title, *sizes, ratio, found.verdict, f"{found.cpu:.0f}"]) + " |"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", choices=list(CELLS), default=list(CELLS), metavar="CELL")
    parser.add_argument("--list", action="store_true", help="print the cells and their numbers")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/RESULTS.md")
    arguments = parser.parse_args(words)
    if arguments.list:
        print("\n".join(f"{number}: {cell.title}" for number, cell in CELLS.items()))
        return
    lines = [f"{datetime.date.today().isoformat()}; Python {platform.python_version()}; {cpu_name()}; two updates", ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if any(CELLS[number].model == "wide" for number in arguments.cells):
            # Not here, for what a process holds its children are measured with.
            make = f"from benchmarks.plan_memory import *; make_wide(Path({str(folder / 'wide')!r}))"
            subprocess.run(python("-c", make), cwd=ROOT, check=True, capture_output=True)
        for number in arguments.cells:
            lines.append(line_of(CELLS[number], measure(CELLS[number], folder)))
            print(lines[-1], flush=True)
            if arguments.write:  # after each row: it may be stopped
                write_section("`python -m benchmarks.plan_memory`", lines)


if __name__ == "__main__":
    main()

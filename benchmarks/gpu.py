"""A training step, the head and decoding on a GPU, in turns with TRL, Liger and transformers: one table, one file.

    python -m benchmarks.gpu --write              all rows; benchmarks/RESULTS.md and gpu.json
    python -m benchmarks.gpu --shapes 1.5b --parts step --repeats 9
    python -m benchmarks.gpu --tiny               every row at toy sizes, on any machine, to see whether it runs

Models have the shapes of Qwen2.5-1.5B and Llama-3.1-8B and random weights in bfloat16, made on the card. A step is the
forward and backward of one update without the optimiser, references given. Tokens are those of the data, each prompt
once, the same number in every row. MFU is the least operations of that data (benchmarks/cards.py: 6 N tokens and
attention) over the time and the card's dense bfloat16 peak. RRHF's scores are such that every pair is out of order, so
that no answer is without a gradient. Waits and memory are of one step that is not timed; graphs that torch.compile
makes are counted in the first step and in a later one.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import importlib.util
import json
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.autograd import backward

from benchmarks import sampling, trl
from benchmarks.cards import is_real, machine, observe, peak_of, real_tokens, step_operations
from benchmarks.data import Lists
from benchmarks.measure import times
from benchmarks.results import write_section
from rankalign.engines import SamplingParams
from rankalign.engines.static import obstacle
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.rows import head_liger
from rankalign.rows.compiled import compile_layers
from rankalign.rows.head import Head, label_logps
from rankalign.storage.files import write_text

PARTS = ("step", "head", "decoding")
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "1.5b": (
        "Qwen2Config",
        {
            "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
            "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
        },
    ),
    "8b": (
        "LlamaConfig",
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip
TOY = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
HEADS = {"Qwen2.5-0.5B": (151936, 896), "Llama-8B": (128256, 4096)}  # vocabulary, hidden size


@dataclass(frozen=True)
class Sizes:
    """How much every row does; lengths of prompts and answers are drawn evenly between the two ends.

    Attributes:
        pairs: lists of two for DPO.
        lists: lists of ``answers`` for RRHF.
        answers: of each of these.
        shortest: tokens of a prompt or an answer at least.
        longest: and at most.
        labels: that the head predicts.
        prompts: that are decoded.
        prompt_tokens: of each of them.
        samples: for each of them.
        new_tokens: of each sample.
    """

    pairs: int = 16
    lists: int = 4
    answers: int = 6
    shortest: int = 64
    longest: int = 448
    labels: int = 3072
    prompts: int = 64
    prompt_tokens: int = 256
    samples: int = 4
    new_tokens: int = 128


TINY = Sizes(2, 2, 3, 3, 9, labels=12, prompts=2, prompt_tokens=5, samples=2, new_tokens=3)
Row = dict[str, Any]
Step = Callable[[], object]


class Skipped(Exception):
    """A row that this machine cannot have, with the reason."""


class Bench:
    """One run: the rows so far, and how they are taken.

    Args:
        device: where models lie.
        sizes: how much every row does.
        repeats: timed runs of a row.
        tiny: toy models.
        keep: called with all rows whenever some are done.
    """

    def __init__(
        self, device: torch.device, sizes: Sizes, repeats: int, tiny: bool, keep: Callable[[list[Row]], None]
    ) -> None:
        self.device, self.sizes, self.repeats, self.tiny, self.keep = device, sizes, repeats, tiny, keep
        self.real = is_real(device)
        self.rows: list[Row] = []
        found = peak_of(torch.cuda.get_device_name(0)) if self.real else None
        self.peak = found[0] if found else None

    def clock(self) -> float:
        """Seconds, after all that the device was given is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def turns(self, what: str, model: Any, contenders: dict[str, Callable[[], Step]], work: Row) -> None:
        """Measure some that do the same work, in turns, and keep a row of each.

        Args:
            what: they do.
            model: whose gradients are cleared between them.
            contenders: by name, each made when it is first run.
            work: ``tokens`` and ``operations`` of one run, where there are such.
        """
        rows: dict[str, Row] = {who: {"what": what, "who": who, **work} for who in contenders}
        steps: dict[str, Step] = {}
        for who, make in contenders.items():
            try:
                step = make()
                at_first = observe(step, self.device)["graphs"]  # loads libraries, tries the model out
                model.zero_grad(set_to_none=False)
                rows[who] |= {**observe(step, self.device), "graphs_at_first": at_first}
                steps[who] = step
            except Skipped as why:
                rows[who]["skipped"] = str(why)
            except torch.OutOfMemoryError:
                rows[who]["skipped"] = "out of memory"
            except Exception as error:  # the other rows of a run on somebody's card are worth more than stopping
                first = str(error).partition("\n")[0]
                rows[who] |= {"failed": f"{type(error).__name__}: {first}", "traceback": traceback.format_exc()}
            self.free()
        taken = times(model, list(steps.values()), self.repeats, self.clock) if steps else []
        for who, seconds in zip(steps, taken, strict=True):
            rows[who]["seconds"] = seconds
            if "tokens" in work:
                rows[who]["tokens_per_second"] = work["tokens"] / seconds
            if "operations" in work:
                rows[who]["tflops"] = work["operations"] / seconds / 1e12
                rows[who]["mfu"] = rows[who]["tflops"] / self.peak if self.peak else None
        for row in rows.values():
            print(line_of(row), flush=True)
        self.rows += rows.values()
        self.keep(self.rows)

    def free(self) -> None:
        """Give the card back what nobody holds any more."""
        gc.collect()
        if self.real:
            torch.cuda.empty_cache()

    # --- parts ---------------------------------------------------------------------------------------------------

    def shape(self, name: str, parts: list[str]) -> None:
        """Decoding and training steps of one model; a card that does not hold it gets a row that says so."""
        try:
            self.model_of(name, parts)
        except torch.OutOfMemoryError:
            self.rows.append({"what": name, "who": "all", "skipped": "out of memory"})
            self.keep(self.rows)

    def model_of(self, name: str, parts: list[str]) -> None:
        """What :meth:`shape` does, as far as memory reaches."""
        kind, settings = SHAPES[name]
        config = getattr(transformers, kind)(**settings | (TOY if self.tiny else {}))
        torch.manual_seed(0)
        with torch.device(self.device):
            auto: Any = transformers.AutoModelForCausalLM
            model = auto.from_config(config, dtype=torch.bfloat16)
        if "decoding" in parts:
            self.decoding(name, model.eval())
        if "step" in parts:
            self.steps(name, model.train())

    def decoding(self, name: str, model: Any) -> None:
        """Answers that never end before the limit, by the loop of engine ``hf`` and by ``generate``."""
        sizes, tokenizer, plain = self.sizes, models.load_tokenizer("tiny"), twin(model)
        rng = random.Random(0)
        prompts = [rng.choices(range(3, 256), k=sizes.prompt_tokens) for _ in range(sizes.prompts)]
        params = SamplingParams(n=sizes.samples, max_new_tokens=sizes.new_tokens)
        answers = sizes.prompts * sizes.samples
        ours = partial(sampling.ours, model, tokenizer, prompts, params, set(), answers)
        theirs = partial(sampling.theirs, plain, prompts, params, set(), sizes.prompts)

        def replayed() -> Step:
            against = obstacle(model, model, graph=True)
            if against:
                raise Skipped(against)
            return partial(ours, "graph")

        contenders: dict[str, Callable[[], Step]] = {
            "engine hf, dynamic": lambda: ours,
            "engine hf, CUDA graph": replayed,
            "transformers generate": lambda: theirs,
        }
        what = f"{name} decoding, {answers} answers of {sizes.new_tokens} to {sizes.prompt_tokens}"
        self.turns(what, model, contenders, {"tokens": answers * sizes.new_tokens})

    def steps(self, name: str, model: Any) -> None:
        """DPO on pairs and RRHF on lists."""
        # Before anything has changed a module: each shares the weights and nothing else.
        plain, liger, unpadded, compiled = (twin(model) for _ in range(4))
        compile_layers(compiled, backend="eager" if self.tiny else "inductor")
        for parameter in model.parameters():  # so that every row's peak has them
            parameter.grad = torch.zeros_like(parameter)
        sizes, vocabulary = self.sizes, model.config.vocab_size
        pairs, lists = (
            draw(count, answers, sizes, vocabulary)
            for count, answers in ((sizes.pairs, 2), (sizes.lists, sizes.answers))
        )
        refs = trl.references(model, pairs)
        self.turns(
            f"{name} DPO step, {len(pairs)} pairs",
            model,
            ours(model, compiled, pairs, refs, "dpo", beta=0.1)
            | {
                "TRL padded": lambda: self.by_trl(plain, pairs, refs),
                "TRL padded, Liger's norms and MLPs": lambda: self.by_trl(with_liger(liger), pairs, refs),
                "TRL padding-free": lambda: self.by_trl(unpadded, pairs, refs, padding_free=True),
            },
            {"tokens": real_tokens(pairs), "operations": step_operations(model, pairs)},
        )
        refs = trl.references(model, lists)
        # Scores rise as log-probs a token fall, so every pair is violated and every answer has a gradient.
        lists = [
            (prompt, answers, [-float(ref) / len(a) for ref, a in zip(some, answers, strict=True)])
            for (prompt, answers, _), some in zip(lists, refs, strict=True)
        ]
        self.turns(
            f"{name} RRHF step, {len(lists)} lists of {sizes.answers}",
            model,
            ours(model, compiled, lists, refs, "rrhf") | {"TRL": no_rrhf},
            {"tokens": real_tokens(lists), "operations": step_operations(model, lists)},
        )

    def by_trl(self, model: Any, lists: Lists, refs: torch.Tensor, padding_free: bool = False) -> Step:
        """TRL's trainer as fast as it goes: no checkpointing, FlashAttention where it is installed, its best batch."""
        need("trl")
        if self.device.type == "cuda" and not self.real:
            raise Skipped("its kernels need a real card")
        if self.real and importlib.util.find_spec("flash_attn"):
            model.set_attn_implementation("flash_attention_2")
        trainer = trl.dpo_trainer(
            model, "tiny", use_cpu=not self.real, gradient_checkpointing=False, padding_free=padding_free
        )
        if padding_free and not trainer.padding_free:
            raise Skipped("this TRL takes padding_free and pads all the same")
        trial = partial(trl.trl_step, model, lists, refs, limit=trl.TRIAL, trainer=trainer)
        return trl.trl_step(model, lists, refs, trl.best_batch(trial, self.clock, warm=True), trainer=trainer)

    def head(self, name: str) -> None:
        """Log-probs of labels and their gradients, counted as three products: what is computed again counts once."""
        vocabulary, hidden = (TOY["vocab_size"], TOY["hidden_size"]) if self.tiny else HEADS[name]
        torch.manual_seed(0)
        layer: Any = torch.nn.Linear(hidden, vocabulary, bias=False, device=self.device, dtype=torch.bfloat16)
        states = torch.randn(self.sizes.labels, hidden, device=self.device, dtype=torch.bfloat16).requires_grad_()
        labels = torch.randint(vocabulary, (self.sizes.labels,), device=self.device)

        def run(liger: bool) -> None:
            head_liger.chosen = liger
            try:
                backward(label_logps(Head(layer.weight), states, labels).sum())
            finally:
                head_liger.chosen = False

        def theirs() -> Step:
            try:
                head_liger.choose("liger", self.device.type == "cuda")
            except InputError as why:
                raise Skipped(str(why)) from why
            return partial(run, True)

        contenders: dict[str, Callable[[], Step]] = {"ours": lambda: partial(run, False), "Liger": theirs}
        work = {"operations": 6 * self.sizes.labels * vocabulary * hidden}
        self.turns(f"head of {name}, {self.sizes.labels} labels", layer, contenders, work)


def ours(
    model: Any, compiled: Any, lists: Lists, refs: torch.Tensor, loss: str, **keywords: Any
) -> dict[str, Callable[[], Step]]:
    """Our ways to take a step."""
    step = partial(trl.our_step, lists=lists, refs=refs, loss=loss, **keywords)
    return {
        "tree rows": lambda: step(model=model, layout="tree"),
        "--layout padded": lambda: step(model=model, layout="padded"),
        "tree rows, --torch_compile": lambda: step(model=compiled, layout="tree"),
    }


def no_rrhf() -> Step:
    raise Skipped("TRL has no RRHF")


def need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Skipped(f"{module} is not installed")


def with_liger(model: Any) -> Any:
    """The model with Liger's norms and SwiGLU, which TRL's trainer would apply as training starts."""
    need("liger_kernel")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # Its rotation is put into the module of transformers, where all other rows would run it too.
    _apply_liger_kernel_to_instance(model=model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)
    return model


def twin(model: Any) -> Any:
    """A model of its own modules over the same weights and gradients."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def draw(count: int, answers: int, sizes: Sizes, vocabulary: int) -> Lists:
    rng = random.Random(0)

    def text() -> list[int]:
        return rng.choices(range(3, vocabulary), k=rng.randint(sizes.shortest, sizes.longest))

    return [(text(), [text() for _ in range(answers)], [float(-n) for n in range(answers)]) for _ in range(count)]


# --- what comes of it --------------------------------------------------------------------------------------------

HEADER = """| what | who | time | tokens/s | TFLOP/s | MFU | waits | peak | graphs compiled at first, then | loss | |
|---|---|---|---|---|---|---|---|---|---|---|"""


def line_of(row: Row) -> str:
    def cell(key: str, form: str, factor: float = 1.0) -> str:
        value = row.get(key)
        return "-" if not isinstance(value, int | float) else form.format(value * factor)

    cells = [row["what"], row["who"], cell("seconds", "{:.1f} ms", 1e3), cell("tokens_per_second", "{:,.0f}")]
    cells += [cell("tflops", "{:.1f}"), cell("mfu", "{:.1%}"), cell("waits", "{:.0f}")]
    cells += [cell("peak", "{:.1f} GiB", 2**-30), f"{cell('graphs_at_first', '{:.0f}')}, {cell('graphs', '{:.0f}')}"]
    loss = cell("value", "{:.4f}") if "step" in row["what"] else "-"
    note = row.get("skipped") or row.get("failed") or ""
    return "| " + " | ".join([*cells, loss, note.replace("|", "/")]) + " |"


def told(about: dict[str, str], sizes: Sizes, repeats: int) -> list[str]:
    """What stands over the table."""
    found = peak_of(about["card"])
    peak = (
        f"peak {found[0]:g} TFLOP/s dense bf16 ({found[1]})" if found else "a card whose peak is not known here: no MFU"
    )
    versions = ", ".join(
        f"{name} {about[name]}" for name in ("torch", "transformers", "trl", "liger-kernel", "flash-attn")
    )
    return [
        f"{datetime.date.today().isoformat()}; {about['card']}, {about['memory_gib']} GiB, driver {about['driver']}, "
        f"CUDA {about['cuda']}; {versions}; {peak}; medians of {repeats}, in turns; texts of {sizes.shortest} to "
        f"{sizes.longest} tokens",
        "",
        *HEADER.splitlines(),
    ]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on any machine")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the file to send (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/RESULTS.md")
    args = parser.parse_args(words)
    device = models.device()
    if device.type != "cuda" and not args.tiny:
        print("benchmarks.gpu: torch sees no GPU here; --tiny runs every row at toy sizes on a CPU", file=sys.stderr)
        return 1
    sizes = TINY if args.tiny else Sizes()
    about = machine(device)
    head = told(about, sizes, args.repeats)

    def keep(rows: list[Row]) -> None:
        """After each group: a run of half an hour may be stopped."""
        file: Row = {"date": datetime.datetime.now().isoformat(timespec="seconds"), "tiny": args.tiny, "machine": about}
        file |= {"peak": peak_of(about["card"]), "sizes": asdict(sizes), "rows": rows}
        write_text(args.out, json.dumps(file, indent=1) + "\n")
        if args.write:
            write_section(f"`python -m benchmarks.gpu`, {about['card']}", [*head, *map(line_of, rows)])

    try:
        keep([])
    except OSError as error:
        print(f"benchmarks.gpu: cannot write {args.out}: {error}; name another with --out", file=sys.stderr)
        return 1
    bench = Bench(device, sizes, args.repeats, args.tiny, keep)
    print("\n".join(head), flush=True)
    for name in HEADS if "head" in args.parts else ():
        bench.head(name)
    for name in args.shapes if {"step", "decoding"} & set(args.parts) else ():
        bench.shape(name, args.parts)
        bench.free()
    failed = [f"{row['what']}, {row['who']}" for row in bench.rows if "failed" in row]
    print(f"{args.out} holds all of it", file=sys.stderr)
    if failed:
        print(f"benchmarks.gpu: failed, with the reason in {args.out}: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

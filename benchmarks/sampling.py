"""Tokens a second of the hf engine's decode loop beside transformers' ``generate``, taken in turns in one run.

    python -m benchmarks.sampling --prompt-tokens 64 --prompts 8 -n 4 --new-tokens 64
    python -m benchmarks.sampling --mixed --prompts 32 --write     also writes benchmarks/RESULTS.md

Without ``--mixed`` all prompts have one length and no answer ends before the limit, so every contender writes the same
number of tokens. With it prompts have 20 to 300 tokens and answers end where the model ends them; padding behind an
end does not count. ``generate`` runs at several batch sizes and its best counts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.measure import environment, write_section
from rankalign.engines import SamplingParams
from rankalign.engines.beams import search
from rankalign.engines.decode import Ending, sample
from rankalign.engines.sampling import uniforms
from rankalign.engines.uncached import rows_of
from rankalign.models import load as models

TEXT = (
    "Every evening the old lighthouse keeper climbs one hundred and twelve steps, trims the wick, polishes the glass, "
    "and writes a line in a book that nobody reads. Ships pass far out, and he guesses their cargo by how they sit. "
)
Prompts = Sequence[list[int]]
Contender = Callable[[], int]


def make_prompts(tokenizer: Any, count: int, length: int, mixed: bool) -> Prompts:
    ids = tokenizer(TEXT * 20, add_special_tokens=False)["input_ids"]
    rng = random.Random(0)
    starts = [rng.randrange(50) for _ in range(count)]
    lengths = [rng.randint(20, 300) if mixed else length for _ in range(count)]
    return sorted((ids[s : s + n] for s, n in zip(starts, lengths, strict=True)), key=len, reverse=True)


def ours(
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    params: SamplingParams,
    eos: set[int],
    rows: int,
    decoding: str = "dynamic",
) -> int:
    """Sampling, or beam search where ``params`` say so; returns how many tokens were written."""
    ends, written, size = Ending(tokenizer, eos, ()), 0, max(rows // params.n, 1)
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        state = rows_of(model, batch, params.max_new_tokens, decoding, params.num_beams > 1)
        if params.num_beams > 1:
            written += sum(len(h.ids) for found in search(state, params, ends, len(eos)) for h in found)
            continue
        answers = [(start + i, k) for i in range(len(batch)) for k in range(params.n)]
        state.select([prompt - start for prompt, _ in answers])
        draws = [uniforms(0, str(prompt), "benchmark", k, params.max_new_tokens) for prompt, k in answers]
        written += sum(len(ids) for ids, _ in sample(state, params, torch.stack(draws), ends))
    return written


def theirs(model: Any, prompts: Prompts, params: SamplingParams, eos: set[int], batch_size: int) -> int:
    """``generate(num_return_sequences=n)``; tokens behind an end of sequence are not counted."""
    written = 0
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in batch], device=model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=model.device)
        output = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=params.n,
            max_new_tokens=params.max_new_tokens,
            eos_token_id=sorted(eos) or -1,
            pad_token_id=0,
        )[:, longest:]
        for row in output.tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
            written += end
    return written


def by_vllm(loaded: Any, prompts: Prompts, params: SamplingParams, eos: set[int]) -> int:
    """The same answers by vLLM, one request each."""
    asked = [(ids, k) for ids in prompts for k in range(params.n)]
    settings = {"temperature": 1.0, "max_tokens": params.max_new_tokens, "ignore_eos": not eos, "detokenize": False}
    done = loaded.complete([ids for ids, _ in asked], [{**settings, "seed": i} for i in range(len(asked))])
    return sum(len(ids) + ended for ids, ended in done)


def measure(contenders: dict[str, Contender], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median tokens a second of each, all taken in turns so that a busy machine hurts all alike."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            started = clock()
            written = run()
            speeds[name].append(written / (clock() - started))
            print(f"{name:24} {speeds[name][-1]:8.1f} tokens/s", flush=True)
    return {name: round(statistics.median(values), 1) for name, values in speeds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("-n", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--rows", type=int, nargs="+", default=[64], help="answers at once in our loop")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8, 16], help="prompts at once in generate")
    parser.add_argument("--beams", action="store_true", help="diverse beam search too: n groups, penalty 1")
    parser.add_argument("--static", action="store_true", help="our loop in memory of fixed size too, without a graph")
    parser.add_argument("--vllm", action="store_true", help="vLLM too, where it is installed (make test-vllm)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds: fairer on a busy machine")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/RESULTS.md")
    args = parser.parse_args()
    model, tokenizer = models.load_policy(args.model), models.load_tokenizer(args.model)
    prompts = make_prompts(tokenizer, args.prompts, args.prompt_tokens, args.mixed)
    params = SamplingParams(n=args.n, max_new_tokens=args.new_tokens)
    groups = SamplingParams(
        n=args.n, max_new_tokens=args.new_tokens, num_beams=args.n, num_beam_groups=args.n, diversity_penalty=1.0
    )
    eos = {tokenizer.eos_token_id} if args.mixed else set()
    contenders: dict[str, Contender] = {}
    for size in sorted({min(size, len(prompts)) for size in args.batch_sizes}):
        contenders[f"generate, batch {size}"] = partial(theirs, model, prompts, params, eos, size)
    for rows in args.rows:
        contenders[f"rankalign, rows {rows}"] = partial(ours, model, tokenizer, prompts, params, eos, rows)
        if args.static:
            fixed = partial(ours, model, tokenizer, prompts, params, eos, rows, "static")
            contenders[f"static, rows {rows}"] = fixed
        if args.beams:
            contenders[f"diverse, rows {rows}"] = partial(ours, model, tokenizer, prompts, groups, eos, rows)
    if args.vllm:
        from rankalign.engines.vllm_loaded import Loaded

        loaded = Loaded.shared(args.model, "", "float32", {})
        contenders["vllm"] = partial(by_vllm, loaded, prompts, params, eos)
        contenders["vllm"]()  # loads it
    speeds = measure(contenders, args.repeats, time.process_time if args.cpu_time else time.perf_counter)
    best = max(speed for name, speed in speeds.items() if name.startswith("generate"))
    ratios = {name: round(speed / best, 2) for name, speed in speeds.items()}
    print(json.dumps({"tokens_per_second": speeds, "ratio_to_best_generate": ratios, **vars(args)}))
    if args.write:
        words = " ".join(word for word in sys.argv[1:] if word != "--write")
        lines = [f"{datetime.date.today().isoformat()}; {environment()}; medians of {args.repeats}", ""]
        lines += ["| who | tokens a second | ratio to the best `generate` |", "|---|---|---|"]
        lines += [f"| {name} | {speeds[name]} | **{ratio:.2f}x** |" for name, ratio in ratios.items()]
        write_section(f"`python -m benchmarks.sampling {words}`", lines)


if __name__ == "__main__":
    main()

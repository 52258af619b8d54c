"""What a training run will take, before any weights are loaded: counts, updates, memory, arithmetic, disk, advice."""

from __future__ import annotations

import math
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankalign.data.encode import TokenList
from rankalign.data.token_table import Joined
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.rows.logps import list_logps, supports_tree
from rankalign.rows.rewards import list_rewards
from rankalign.rows.tree import tree_tokens
from rankalign.training import heap
from rankalign.training.arguments import TrainConfig
from rankalign.training.fit import check_fit
from rankalign.training.inputs import check_held_out, data_hashes, load_data, load_model
from rankalign.training.plan.memory import Footprint, build, trace
from rankalign.training.plan.on_card import Setup, fit_on_card, layers_of, made_up, reference_bytes

UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
LAUNCHERS = ("one process", "DDP", "FSDP2 or ZeRO-2", "ZeRO-3", "ZeRO-3 with offload")


def plan(config: TrainConfig, device_memory: str = "", devices: int = 0, probe: bool = False) -> dict[str, Any]:
    """Everything that ``rankalign plan`` prints.

    Args:
        config: the run, of method rank, sft or reward.
        device_memory: of one device, such as ``24GiB``; empty for this machine's.
        devices: how many there are; 0 for this machine's.
        probe: load the model and time three micro-batches.

    Raises:
        InputError: bad settings or data, or ``--method ppo``, whose answers are not there yet.
    """
    if config.method == "ppo":
        raise InputError("plan reads a file of candidates; --method ppo writes its own answers while it runs")
    room = _bytes(device_memory) if device_memory else _memory_here(config)
    devices = devices or max(torch.cuda.device_count(), 1)
    data_hashes(config.data_settings)
    tokenizer = models.load_tokenizer(config.model)
    lists, held_out, counts = load_data(config.data_settings, config.loss_settings, tokenizer)
    check_held_out(held_out, config.eval_strategy != "no", config.metric_for_best_model)
    model = build(config.model_settings, config.method == "reward", config.weights_dtype)
    check_fit(model, Joined(lists, held_out))
    baseline = _resident()  # after all that training imports, adapters among them
    layout = _layout(config, model)
    batches = Batches(lists, config, layout, devices)
    footprint = batches.trace()
    items = {**footprint.items, "process": baseline, **_reference(config, model)}
    work = _work(model, lists, config, batches)
    facts = {**_counts(lists, counts), "steps": batches.steps, "epochs": batches.epochs}
    facts |= {"micro_batches": batches.micro_batches, "layout": layout, "tokens": batches.tokens(), "work": work}
    facts |= {"peak_memory_bytes": sum(items.values()), "memory": items, "disk_bytes": _disk(config, model, footprint)}
    facts["peak_memory_range_bytes"], facts["peak_memory_range_reason"] = _range(config, items)
    # of this machine's memory the most that may be taken decides; a card named by its size has another allocator
    holes = 0 if device_memory else facts["peak_memory_range_bytes"][1] - sum(items.values())
    launchers = _launchers(items, devices, len(layers_of(model)))
    facts |= {"device_memory_bytes": room, "devices": devices, "launchers": launchers}
    facts["launcher"] = next((name for name in LAUNCHERS if launchers.get(name, math.inf) + holes <= room), None)
    facts["advice"] = _advice(config, facts, model)
    return facts | {"seconds": _probe(config, batches, layout) if probe else None}


def plan_on_card(config: TrainConfig, setup: Setup, card: str, sizes: tuple[int, int, int]) -> dict[str, Any]:
    """Whether a run fits on cards that are not here.

    Args:
        config: the run, of method rank or sft; without ``--data`` lists are made up, and ``--model`` may be a shape.
        setup: the cards and how they are used.
        card: its name, to be told.
        sizes: of made-up lists: tokens of a prompt and of an answer, and answers.

    Raises:
        InputError: bad settings or data.
    """
    if config.method not in ("rank", "sft"):
        raise InputError(f"plan --device knows methods rank and sft, not {config.method}")
    if config.references == "ahead" and setup.spreads:
        raise InputError("--references ahead needs whole weights, and here they are sharded: leave it out")
    if config.data:
        data_hashes(config.data_settings)
        lists, _, counts = load_data(config.data_settings, config.loss_settings, models.load_tokenizer(config.model))
        facts = _counts(lists, counts)
    else:
        lists, facts = made_up(*sizes, config.train_batch_size), {}
    check_fit(build(config.model_settings), lists)
    batches = Batches(lists, config, "tree", setup.devices)
    part = batches.largest_part()
    again = config.gradient_accumulation_steps > 1 or len(part) < len(batches.largest())
    facts |= {"steps": batches.steps if config.data else None, "device": card, "devices": setup.devices}
    facts |= {"sharding": setup.sharding, "offload": setup.offload, "vllm_share": setup.vllm}
    facts |= fit_on_card(config, part, setup, again, batches.two_passes(part), batches.size)
    return {**facts, "seconds": None, "advice": [_verdict_in_words(facts)]}


def _verdict_in_words(facts: dict[str, Any]) -> str:
    peak, room = _human(facts["peak_memory_bytes"]), _human(facts["room_bytes"])
    if not facts["fits"]:
        more = "--gradient_checkpointing, --use_lora, --load_in_4bit, --sharding fsdp2 with more --devices or --offload"
        return f"Does not fit: {peak} foreseen, {room} there. What takes less: {more}."
    return f"Fits: {peak} foreseen, {room} there; --token_budget up to about {facts['largest_token_budget']} would."


# --- counts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batches:
    """How the trainer will cut the lists into updates.

    Attributes:
        lists: the data, in file order.
        config: the run.
        layout: ``tree`` or ``padded``.
        devices: ranks that share each update.
    """

    lists: Sequence[TokenList]
    config: TrainConfig
    layout: str
    devices: int = 1

    @property
    def micro_batches_an_epoch(self) -> int:
        """Of one rank."""
        size, count = self.config.train_batch_size, len(self.lists)
        whole = count // size if self.config.dataloader_drop_last else -(-count // size)
        return -(-whole // self.devices)

    @property
    def updates_an_epoch(self) -> int:
        """The last one may have fewer micro-batches."""
        return max(-(-self.micro_batches_an_epoch // self.config.gradient_accumulation_steps), 1)

    @property
    def steps(self) -> int:
        """Updates of the run."""
        if self.config.max_steps > 0:
            return self.config.max_steps
        return math.ceil(self.config.num_train_epochs * self.updates_an_epoch)

    @property
    def epochs(self) -> float:
        """Passes over the data, the last perhaps not whole."""
        return self.steps / self.updates_an_epoch

    @property
    def micro_batches(self) -> int:
        """Of one rank, over the whole run."""
        whole, rest = divmod(self.steps, self.updates_an_epoch)
        some = min(rest * self.config.gradient_accumulation_steps, self.micro_batches_an_epoch)
        return whole * self.micro_batches_an_epoch + some

    def size(self, lists: Sequence[TokenList], layout: str = "") -> int:
        """Tokens of the rows that these lists fill."""
        if (layout or self.layout) == "tree":
            return sum(tree_tokens(len(t.prompt), [len(r) for r in t.responses]) for t in lists)
        return sum(len(t.responses) for t in lists) * max(len(t.prompt) + max(map(len, t.responses)) for t in lists)

    def largest(self) -> list[TokenList]:
        """The largest micro-batch that the shuffle can draw."""
        return sorted(self.lists, key=lambda t: -self.size([t]))[: self.config.train_batch_size]

    def largest_part(self) -> list[TokenList]:
        """The most that runs at once: whole lists within the token budget, or one list that exceeds it."""
        order = sorted(self.lists, key=lambda t: -self.size([t]))
        best: list[TokenList] = order[:1]
        for start in range(len(order)):
            part = order[start : start + 1]
            for tokens in order[start + 1 : start + self.config.train_batch_size]:
                if self.size([*part, tokens]) <= self.config.token_budget:
                    part.append(tokens)
            if self.size(part) > self.size(best):
                best = part
            if len(part) == self.config.train_batch_size:
                break  # later windows hold smaller lists
        return best

    def two_passes(self, part: Sequence[TokenList]) -> bool:
        """Whether the trainer runs these lists in two passes."""
        if self.config.two_pass != "auto":
            return self.config.two_pass == "always"
        return self.config.can_two_pass and self.size(part) > self.config.token_budget

    def trace(self) -> Footprint:
        """Memory of the largest part, see :func:`rankalign.training.plan.memory.trace`."""
        part = self.largest_part()
        again = self.config.gradient_accumulation_steps > 1 or len(part) < len(self.largest())
        return trace(self.config, part, self.layout, self.two_passes(part), again)

    def tokens(self) -> dict[str, int | float]:
        """Tokens of a list and of the data, in rows that share prompts and in padded ones."""
        each = [self.size([t], "tree") for t in self.lists]
        found = {"median": statistics.median(each), "max": max(each), "packed": sum(each)}
        return {**found, "padded": sum(self.size([t], "padded") for t in self.lists)}


def _counts(lists: Sequence[TokenList], counts: dict[str, int]) -> dict[str, Any]:
    cut = {name: counts.get(name, 0) for name in ("prompt_truncated", "response_truncated")}
    kept = {"prompts": len(lists), "candidates": sum(len(t.responses) for t in lists)}
    dropped = counts.get("dropped_prompts", 0) + counts.get("skipped_invalid", 0)
    kept["widest_list"] = max(len(t.responses) for t in lists)
    return {**kept, "dropped": dropped, "truncated": sum(cut.values()), "counts": counts}


def _layout(config: TrainConfig, model: Any) -> str:
    """``auto`` is decided by numbers of the model itself when training starts; here by those of a small copy."""
    if config.layout != "auto":
        return config.layout
    return "tree" if supports_tree(model) else "padded"


# --- how sure ----------------------------------------------------------------------------------------------------

CERTAIN = 0.15  # of the grid of benchmarks/plan_memory.py, on a CPU, no peak lay so far off; on a GPU none was measured


def _range(config: TrainConfig, items: dict[str, int]) -> tuple[list[int], str]:
    """Least and most that the peak may be, and why the one figure is no surer than that.

    glibc gives freed blocks out again only where an aligned new one fits, which depends on the order of all requests.
    The least is what is alive at the peak, without any hole, if that is less. What training hands back on its way
    bounds the holes (:mod:`rankalign.training.heap`); what passes within one module, and what libraries keep beside,
    does not show in a trace.
    """
    peak, holes = sum(items.values()), items.get("allocator", 0)
    low, high = min(peak - holes, round(peak * (1 - CERTAIN))), round(peak * (1 + CERTAIN))
    if torch.cuda.is_available() and not config.use_cpu:
        return [peak - holes, high], "blocks that the allocator keeps"
    between = heap.growth(peak - holes)
    most = round((peak - holes + between) * (1 + CERTAIN))
    why = (
        "a CPU's allocator (glibc) leaves holes by the order of requests: "
        f"{between >> 20} MiB between two modules, and more within one"
    )
    return [low, max(high, most)], why


def _reference(config: TrainConfig, model: nn.Module) -> dict[str, int]:
    """The second copy of the weights from which references are computed while a run trains; none under a fresh adapter,
    and none is loaded where all are known already. One that moves keeps copies of what trains."""
    size = reference_bytes(config, model)
    return {"reference": size} if size else {}


# --- memory, arithmetic, disk ------------------------------------------------------------------------------------


def _resident() -> int:
    """Bytes this process holds now, with all that training imports."""
    status = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def _memory_here(config: TrainConfig) -> int:
    if torch.cuda.is_available() and not config.use_cpu:
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", text.strip())
    if not match or match[2] not in UNITS or match[1].count(".") > 1 or match[1] == ".":
        raise InputError(f"--device_memory {text!r} is no amount of memory; write it like 24GiB")
    return int(float(match[1]) * UNITS[match[2]])


def _weights(model: nn.Module) -> tuple[int, int]:
    """Bytes of all weights, and numbers that train."""
    every = list(model.parameters())
    return sum(p.numel() * p.element_size() for p in every), sum(p.numel() for p in every if p.requires_grad)


def _work(model: Any, lists: Sequence[TokenList], config: TrainConfig, batches: Batches) -> dict[str, int]:
    """Tokens and multiply-adds times two, of the whole run over all ranks; attention's own products are left out."""
    embedding = model.get_input_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters() if p.dim() == 2) - embedding  # norms and biases multiply nothing
    head = model.get_output_embeddings()
    tied = head is None or head.weight is model.get_input_embeddings().weight
    rows = sum(batches.size([t]) for t in lists)
    labels = sum(len(r) for t in lists for r in t.responses)
    body -= 0 if tied else head.weight.numel()  # the head is reached at labels alone, below
    forward = 2 * (body * rows + (head.weight.numel() * labels if head is not None else 0))
    _, training = _weights(model)
    share = 1 + min(training / max(body + embedding, 1), 1)  # gradients of inputs, and of the weights that train
    more = forward * (int(bool(config.gradient_checkpointing)) + int(batches.two_passes(batches.largest_part())))
    epochs = batches.epochs
    return {
        "forward_tokens": round(rows * epochs),
        "backward_tokens": round(rows * epochs),
        "forward_flops": round((forward + more) * epochs),
        "backward_flops": round(forward * share * epochs),
    }


def _disk(config: TrainConfig, model: nn.Module, footprint: Footprint) -> int:
    """Checkpoints with their optimiser states, and the model at the end."""
    whole, training = _weights(model)
    saved = training * 4 if config.use_lora else whole  # adapters are saved in float32
    kept = 0 if config.save_strategy == "no" else config.save_total_limit or 1
    return saved + kept * (saved + footprint.items.get("optimiser", 0))


def _launchers(items: dict[str, int], devices: int, layers: int) -> dict[str, int]:
    """Peak bytes of one device by launcher. Sharded weights are gathered a layer at a time, two layers at once."""
    get = items.get
    weights, gradients, states = (get(name, 0) for name in ("weights", "gradients", "optimiser"))
    rest = sum(items.values()) - weights - gradients - states
    found = {"one process": weights + gradients + states + rest}
    gathered, spread = 2 * weights // layers, rest - get("reference", 0)  # sharded runs have all references before
    if devices > 1:
        found["DDP"] = found["one process"] + gradients  # its buckets are a second copy
        found["FSDP2 or ZeRO-2"] = weights + (gradients + states) // devices + spread
        found["ZeRO-3"] = (weights + gradients + states) // devices + gathered + spread
    return {**found, "ZeRO-3 with offload": gathered + spread}


# --- advice ------------------------------------------------------------------------------------------------------


def _advice(config: TrainConfig, facts: dict[str, Any], model: Any) -> list[str]:
    """What would make the run smaller, each with about what it would bring; and what the data loses."""
    items, said = facts["memory"], []
    active = items.get("activations", 0) + items.get("head", 0) + items.get("allocator", 0)
    fixed = items.get("gradients", 0) + items.get("optimiser", 0)
    if facts["launcher"] is None:
        said.append(f"Nothing fits in {_human(facts['device_memory_bytes'])}: take more or larger devices.")
    if not config.use_lora and not config.freeze_layers:
        said.append(f"--use_lora true would save about {_human(fixed)} of gradients and optimiser states.")
    if not config.gradient_checkpointing:
        saved = int(active * (1 - 2 / max(len(layers_of(model)), 2)))
        said.append(f"--gradient_checkpointing true would save up to {_human(saved)}, for about a third more time.")
    widest = facts["widest_list"]
    if widest > 4:
        said.append(f"--max_candidates {widest // 2} would about halve the {_human(active)} that lists take.")
    if config.can_two_pass and config.two_pass == "auto":
        said.append(
            f"--token_budget {config.token_budget // 2} halves what runs at once (the result stays the same); a list "
            "that is longer runs in two passes, for about a third more time."
        )
    if facts["truncated"]:
        said.append(f"{facts['truncated']} texts are cut: a --max_length above {config.max_length} would keep more.")
    if facts["launcher"] == "one process" and facts["devices"] > 1:
        said.append("One process fits; DDP (torchrun) over all devices divides the time.")
    return said


def _human(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.1f} MiB"


# --- time --------------------------------------------------------------------------------------------------------


def _probe(config: TrainConfig, batches: Batches, layout: str) -> float:
    """Seconds of the run, from a step on the largest, the median and the first lists, after one to warm up."""
    tokenizer, reward = models.load_tokenizer(config.model), config.method == "reward"
    model = load_model(config.model_settings, tokenizer, reward, config.weights_dtype).train()
    # Takes its time and changes nothing.
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    order = sorted(batches.lists, key=lambda t: batches.size([t]))
    largest, median = order[-1], order[len(order) // 2]
    values: Callable[..., Tensor] = list_rewards if config.method == "reward" else list_logps
    took, tokens = 0.0, 0
    for i, one in enumerate((median, largest, median, batches.lists[0])):
        started = time.perf_counter()
        values(model, [one.prompt], [one.responses], layout=layout).sum().backward()  # type: ignore[no-untyped-call]
        if i:  # the first one sets the kernels up
            took, tokens = took + time.perf_counter() - started, tokens + batches.size([one])
    started = time.perf_counter()
    optimiser.step()
    rows = sum(batches.size([t]) for t in batches.lists) * batches.epochs / batches.devices
    return took / tokens * rows + (time.perf_counter() - started) * batches.steps

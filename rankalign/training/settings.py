"""What a training run depends on, in four small groups; no torch and no transformers, so that ``--help`` is text alone.

:class:`rankalign.training.arguments.TrainConfig` is made of them: each field here is one flag there. Functions that
take a group can be called by anyone who writes ``DataSettings(data="scored.jsonl")``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankalign.errors import InputError
from rankalign.registry import did_you_mean
from rankalign.storage.code import as_input_error, code_hash, hash_of, is_code, load_code
from rankalign.storage.jsonl import loads
from rankalign.training.flags import flag

if TYPE_CHECKING:
    from rankalign.losses import Loss

METHODS = ("rank", "sft", "reward", "ppo")
WEIGHTS = ("auto", "float32", "bfloat16")
TWO_PASS = ("auto", "always", "never")
BATCH_BY = ("prompts", "tokens")
REFERENCES = ("auto", "ahead", "before")
FLASH = ("fa2", "fa3", "fa4")
HEADS = ("ours", "liger")
WEIGHTED_BY_BETA = ("orpo",)  # a term beside another; in all other losses beta scales all that there is


@dataclass(frozen=True)
class ModelSettings:
    """What is trained, and which part of it; read by :func:`rankalign.training.inputs.load_model`."""

    model: str = flag("default", "start model: default, tiny, a folder or a hub id")
    add_tokens: str = flag("", "special tokens to add, comma-separated; new rows start at the mean of the old ones")
    dtype: str = flag(
        "auto", "weights' type while training: float32, bfloat16, or auto: bfloat16 on GPUs with --use_lora and --bf16"
    )
    use_lora: bool = flag(False, "train a LoRA adapter instead of all weights; where --model is one, train it on")
    use_dora: bool = flag(False, "with --use_lora: DoRA, which also learns the length of each weight column")
    load_in_4bit: bool = flag(False, "with --use_lora: frozen weights in 4 bits (nf4, QLoRA), by bitsandbytes")
    load_in_8bit: bool = flag(False, "with --use_lora: frozen weights in 8 bits, by bitsandbytes")
    lora_r: int = flag(16, "rank of the adapter")
    lora_alpha: int = flag(32, "scale of the adapter")
    lora_dropout: float = flag(0.0, "dropout inside the adapter")
    lora_target_modules: str = flag(
        "auto", "modules to adapt, comma-separated; auto takes all linear ones but the head"
    )
    lora_target_parameters: str = flag(
        "",
        "weights to adapt that are no module, comma-separated: those of experts, such as "
        "mlp.experts.gate_up_proj,mlp.experts.down_proj",
    )
    pooling: str = flag("", "reward: where a new head reads: last_non_pad (as transformers), last, first_eos or mean")
    freeze_layers: float = flag(0.0, "reward: share of the lower layers, and the embeddings, that stay as they are")
    keep_float32: bool = flag(False, "save float32 weights also where the start model's are bfloat16 or float16")
    disable_dropout: bool = flag(True, "switch the model's own dropout off, so that log-probabilities are exact")

    def __post_init__(self) -> None:
        if self.use_dora and not self.use_lora:
            raise InputError("--use_dora is a kind of --use_lora: give both (and not with --method ppo)")
        if self.use_lora:
            self.lora_targets  # noqa: B018 - refuses an empty name before the model is loaded
        for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters"):
            if not self.use_lora and getattr(self, name) != getattr(ModelSettings, name):
                raise InputError(f"--{name} {getattr(self, name)} does nothing without --use_lora")
        if self.dtype not in WEIGHTS:
            raise InputError(f"unknown --dtype {self.dtype!r} (one of: {', '.join(WEIGHTS)})")
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("--load_in_4bit and --load_in_8bit exclude each other")
        if self.quantised and not self.use_lora:
            raise InputError(f"--load_in_{self.quantised}bit needs --use_lora and method rank or sft")

    @property
    def quantised(self) -> int:
        """Bits of the frozen weights, 4 or 8; 0 where they are whole."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else 0

    @property
    def lora_targets(self) -> str | list[str]:
        """``auto``, or the names of the modules to adapt."""
        names = [name.strip() for name in self.lora_target_modules.split(",")]
        if not all(names):
            raise InputError(f"--lora_target_modules {self.lora_target_modules!r}: a name is empty")
        return "auto" if names in (["auto"], ["all-linear"]) else names

    @property
    def lora_parameters(self) -> list[str]:
        """The names of the weights to adapt that are no module."""
        return [name.strip() for name in self.lora_target_parameters.split(",") if name.strip()]


@dataclass(frozen=True)
class DataSettings:
    """Which candidates are read and how they become tokens; read by :func:`rankalign.training.inputs.load_data`."""

    data: str = flag(
        "", "scored candidates in any format: file, folder, pattern or hub id, or several: PATH:SPLIT#COUNT*WEIGHT, ..."
    )
    format: str = flag(
        "auto", "format of the data: auto, a name of `rankalign ls formats`, or a function of yours (my_format.py:read)"
    )
    eval_data: str = flag("", "held-out candidates; with --eval_strategy steps|epoch they are measured while training")
    eval_split: float = flag(0.0, "share of the data that is held out instead, chosen by their content")
    judge: str = flag("", "whose scores rank the candidates, or several with weights: rm:0.7,vader:0.3")
    axes: str = flag("", "reward, loss quality: judges whose scores are learnt side by side, one output each")
    template: str = flag("auto", "prompt format: auto, chat, alpaca, vicuna, hh, raw")
    system: str = flag("", "system message put before each prompt")
    allow_special_in_text: bool = flag(False, "control tokens that texts spell are control tokens, not text")
    thoughts: str = flag(
        "", "what models thought: keep, mask (in context, no loss), drop; empty: keep, drop for --method reward"
    )
    max_length: int = flag(512, "most tokens of prompt and response together")
    max_candidates: int = flag(0, "candidates a prompt, spread over its ranking; 0 takes all")
    only_use_provide: bool = flag(False, "only the last two responses of each prompt (RRHF's setting P)")
    only_use_sample: bool = flag(False, "all but the last two responses (RRHF's settings D and B)")
    stop_response: bool = flag(False, "cut responses at the marks of HH dialogues")
    skip_invalid: bool = flag(False, "leave bad lines of the data out, with their count, instead of stopping")
    ignore_columns: str = flag("", "columns of the data that may stay unread, comma-separated, or `all`")
    token_cache: str = flag(
        "", "folder that keeps tokens for later runs; empty is `tokens` among the cached models, off keeps none"
    )
    num_proc: int = flag(0, "processes that make tokens; 0 takes one a core where there is enough to do")

    def __post_init__(self) -> None:
        if self.thoughts not in ("", "keep", "mask", "drop"):
            raise InputError(f"unknown --thoughts {self.thoughts!r} (one of: keep, mask, drop)")
        if not 0 <= self.eval_split < 1 or (self.eval_split and self.eval_data):
            raise InputError(f"--eval_split {self.eval_split:g}: a share from 0 to below 1, and not beside --eval_data")
        if self.only_use_provide and self.only_use_sample:
            raise InputError("--only_use_provide and --only_use_sample leave no response between them; choose one")
        if self.num_proc < 0:
            raise InputError(f"--num_proc {self.num_proc}: name a number of processes, or 0 for one a core")

        names = self.axis_names
        if self.axes and (len(names) < 2 or len(set(names)) < len(names)):
            raise InputError(f"--axes {self.axes!r}: name at least two judges, each once; of one, use --judge")
        if self.axes and self.judge:
            raise InputError("--axes and --judge both say whose scores are learnt; give one of them")

    @property
    def axis_names(self) -> tuple[str, ...]:
        """The names of ``axes``."""
        return tuple(filter(None, map(str.strip, self.axes.split(","))))

    @property
    def paths(self) -> list[str]:
        """The files that are read."""
        return [path for path in (self.data, self.eval_data) if path]


@dataclass(frozen=True)
class LossSettings:
    """What is learned; read by :func:`rankalign.training.inputs.references_of`."""

    method: str = flag("rank", "rank (any ranking loss), sft (the best response alone), reward (a reward model), ppo")
    loss: str = flag(
        "rrhf",
        "of `rankalign ls losses`, a function of yours (my_losses.py:fn), or a mixture such as dpo+0.2*sft (in YAML a "
        "list too); for reward bradley_terry, plackett_luce, per_token or quality",
    )
    loss_options: str = flag("{}", "more keywords of the loss: a JSON object, or a mapping in YAML")
    rrhf_weight: float | None = flag(None, "weight of RRHF's rank term beside its SFT term (paper: 1)")
    length_penalty: float | None = flag(None, "RRHF: log-probabilities are divided by length to this power (1)")
    beta: float | None = flag(None, "strength of the pull to the reference in DPO and its relatives")
    router_aux_loss_coef: float | None = flag(
        None,
        "mixtures of experts: weight of the routers' load-balancing loss; by itself that of the model's config where "
        "it has output_router_logits, else 0",
    )
    sync_ref_model: bool = flag(False, "the reference follows the policy: TR-DPO, or BEMA with --ref_model_bema")
    ref_model_mixup_alpha: float = flag(0.6, "it becomes alpha * policy + (1 - alpha) * reference; 1 is the policy")
    ref_model_sync_steps: int = flag(512, "every so many updates")
    ref_model_bema: bool = flag(False, "by BEMA, a mean of the policies so far without its bias, and not by alpha")

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"unknown method {self.method!r}{did_you_mean(self.method, METHODS)}")
        known = self._known
        for name in self._weights:
            if not is_code(name) and name not in known:
                raise InputError(f"unknown loss {name!r}{did_you_mean(name, known)}")
        self.entry  # noqa: B018 - tries a function of the user's own
        self._check_moving()

    def _check_moving(self) -> None:
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps", "ref_model_bema"):
            if not self.sync_ref_model and getattr(self, name) != getattr(LossSettings, name):
                raise InputError(f"--{name} {getattr(self, name)} does nothing without --sync_ref_model")
        if not 0 < self.ref_model_mixup_alpha <= 1 or self.ref_model_sync_steps < 1:
            raise InputError("--ref_model_mixup_alpha is above 0 and at most 1, --ref_model_sync_steps at least 1")
        if self.sync_ref_model and (self.method != "rank" or not self.entry.needs_reference):
            raise InputError(f"--sync_ref_model: loss {self.loss!r} has no reference that could move")

    @property
    def grades(self) -> bool:
        """Whether a reward model is trained, and not one that writes."""
        return self.method == "reward"

    @property
    def _known(self) -> dict[str, Loss]:
        # Losses are torch, which printing a help text must not load.
        from rankalign.losses import LOSSES
        from rankalign.losses.reward import REWARD_LOSSES

        return REWARD_LOSSES if self.grades else LOSSES

    @property
    def _weights(self) -> dict[str, float]:
        from rankalign.losses.mixtures import parse

        # A reward model's loss may read more than Ranked, so those are not mixed.
        return {self.loss: 1.0} if self.grades else parse(self.loss)

    @property
    def entry(self) -> Loss:
        """The loss by its name or names, among those of the method."""
        from rankalign.losses.mixtures import mixture

        known, weights = dict(self._known), dict[str, float]()
        for spec, weight in self._weights.items():
            name = spec.rpartition(":")[2].rpartition(".")[2]
            if name in weights:
                raise InputError(f"loss {self.loss!r} names {name!r} twice; one of them needs another name")
            weights[name] = weight
            if is_code(spec):
                known[name] = self._own(spec)
        return mixture(weights, known)

    def _own(self, spec: str) -> Loss:
        """The loss made of a function of the user's own."""
        if self.grades:
            raise InputError(f"--loss {spec}: a function of your own is for --method rank")
        function, file = load_code(spec, f"loss {spec}")
        key = spec, code_hash(function, file, spec)
        if key not in _OWN:
            from rankalign.losses.own import own_loss

            _OWN[key] = own_loss(_guarded(function, f"loss {spec}"), spec)
        return _OWN[key]

    @property
    def code(self) -> dict[str, str]:
        """SHA-256 of each function of the user's own among the losses, by its name."""
        return {spec: hash_of(spec) for spec in self._weights if is_code(spec)}

    def keywords(self) -> dict[str, Any]:
        """Keywords the loss is called with.

        Raises:
            InputError: one that this loss does not have.
        """
        named = {name: getattr(self, name) for name in ("rrhf_weight", "length_penalty", "beta")}
        given = {
            **json_object(self.loss_options),
            **{name: value for name, value in named.items() if value is not None},
        }
        known = self.entry.defaults
        for name in given:
            if name not in known:
                raise InputError(f"loss {self.loss!r} has no option {name!r}{did_you_mean(name, known)}")
            _check_keyword(self.loss, name, given[name], known[name])
        return given


def _guarded(function: Callable[..., Any], where: str) -> Callable[..., Any]:
    """The function, whose errors name it and the line, in the trial and while training."""

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        with as_input_error(where):
            return function(*args, **keywords)

    return call


# By name and source: a loss is asked for often, and tried once.
_OWN: dict[tuple[str, str], Loss] = {}


def _check_keyword(loss: str, name: str, value: Any, default: Any) -> None:
    """Refuse what is no number where one is wanted, and numbers that turn a loss round or leave nothing of it."""
    numbers = not isinstance(default, bool) and isinstance(default, int | float)
    if numbers and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise InputError(f"loss {loss!r}: {name} is a number ({default:g} by itself), found {value!r}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value):
        raise InputError(f"loss {loss!r}: {name} is {value}, not a finite number")
    only, _, name = name.rpartition(".")  # of one loss in a mixture
    least = name == "beta" and (only or loss) not in WEIGHTED_BY_BETA
    if (name in ("beta", "rrhf_weight") and value < 0) or (least and value == 0):
        why = "below 0 it would turn the preference round" if value < 0 else "with 0 there is no preference left"
        raise InputError(f"loss {loss!r}: {name} {value:g} makes no sense: {why}")


@dataclass(frozen=True)
class RunSettings:
    """How a run goes: what is computed at once, what is measured, and what happens to an earlier run's folder."""

    watch: str = flag("", "module:function that grades greedy answers to 32 prompts of --eval_data at each measurement")
    layout: str = flag("auto", "tree (prompts shared, nothing padded), padded, or auto")
    token_budget: int = flag(4096, "most tokens run at once; longer micro-batches run in parts, with the same result")
    batch_by: str = flag(
        "prompts",
        "how an update runs: prompts (the micro-batches that were drawn) or tokens (all its lists in even rows of at "
        "most --token_budget)",
    )
    references: str = flag(
        "auto",
        "log-probabilities of the start model: ahead of each update, from a second copy of the weights unless "
        "--use_lora, before the first one, or auto: ahead, unless weights are sharded or the copy takes too much",
    )
    two_pass: str = flag(
        "auto",
        "two backward passes, memory flat in the candidates: always, never, or auto where a list exceeds the budget",
    )
    flash_attention: str = flag("fa2", "on GPUs, FlashAttention: fa2 (torch's own), or fa3 or fa4 where installed")
    head: str = flag("ours", "on GPUs, the language-model head: ours, or Liger's to compare, where installed")
    early_stopping: int = flag(0, "stop after so many measurements without a better one; 0 does not")
    resume: bool = flag(True, "go on from the newest checkpoint in output_dir where there is one")
    overwrite: bool = flag(False, "start over even where output_dir holds a finished or begun run")

    def __post_init__(self) -> None:
        if self.two_pass not in TWO_PASS:
            raise InputError(f"unknown --two_pass {self.two_pass!r} (one of: {', '.join(TWO_PASS)})")
        for name, known in (("flash_attention", FLASH), ("head", HEADS)):
            if getattr(self, name) not in known:
                raise InputError(f"unknown --{name} {getattr(self, name)!r} (one of: {', '.join(known)})")
        if self.batch_by not in BATCH_BY:
            raise InputError(f"unknown --batch_by {self.batch_by!r} (one of: {', '.join(BATCH_BY)})")
        if self.references not in REFERENCES:
            raise InputError(f"unknown --references {self.references!r} (one of: {', '.join(REFERENCES)})")
        if self.token_budget < 1:
            raise InputError("--token_budget must be at least 1")


@dataclass(frozen=True)
class TrainerDefaults:
    """Flags of transformers' own whose defaults differ here: those of RRHF's command line, and no log line lost."""

    output_dir: str | None = flag("runs/rrhf", "where checkpoints, log.jsonl, the final model and the manifest go")
    learning_rate: float | None = flag(None, "peak learning rate; by itself that of the loss and method, see losses.md")
    bf16: bool | None = flag(None, "products in bfloat16; by itself on GPUs that have it")
    num_train_epochs: float = flag(3.0, "passes over the data")
    lr_scheduler_type: str = flag("cosine", "schedule")
    warmup_steps: float = flag(0.03, "warm-up: steps, or a share of all steps where below 1")
    per_device_train_batch_size: int = flag(4, "prompts a micro-batch, each with all its candidates")
    gradient_accumulation_steps: int = flag(2, "micro-batches an update")
    logging_steps: float = flag(1, "steps between log lines")
    save_steps: float = flag(100, "steps between checkpoints")
    save_total_limit: int | None = flag(2, "checkpoints to keep")
    ddp_find_unused_parameters: bool | None = flag(False, "off: every weight takes part in every update")
    remove_unused_columns: bool = flag(False, "must stay off: batches are token lists")
    logging_nan_inf_filter: bool = flag(False, "off: a loss that is not finite is an error here, not a gap in the log")


GROUPS: tuple[type[Any], ...] = (ModelSettings, DataSettings, LossSettings, RunSettings, TrainerDefaults)
"""All flags of every method, in the order in which they are shown."""


def json_object(text: str) -> dict[str, Any]:
    """A setting that holds a JSON object.

    Raises:
        InputError: it holds something else.
    """
    try:
        value = loads(text)
    except ValueError as error:
        raise InputError(f"loss_options: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"loss_options: expected a JSON object, found {text}")
    return value

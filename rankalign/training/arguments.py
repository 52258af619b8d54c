"""Settings of ``rankalign train``: our own flags beside every flag of transformers' TrainingArguments."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from rankalign.config import read_yaml
from rankalign.errors import InputError
from rankalign.losses import LOSSES, Loss
from rankalign.losses.reward import REWARD_LOSSES
from rankalign.registry import did_you_mean
from rankalign.storage.jsonl import dumps, loads
from rankalign.training.flags import flag as _flag
from rankalign.training.old_names import modernise
from rankalign.training.ppo_settings import FOREIGN, PPOSettings

METHODS = ("rank", "sft", "reward", "ppo")
TWO_PASS = ("auto", "always", "never")
ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass
class TrainConfig(TrainingArguments):
    """Everything a training run depends on; help texts are the fields' documentation."""

    model: str = _flag("default", "start model: default, tiny, a folder or a hub id")
    data: str = _flag("", "scored candidates: our records, or RRHF, TRL or Alpaca files")
    format: str = _flag("auto", "format of the data: auto or a name of `rankalign ls formats`")
    eval_data: str = _flag("", "held-out candidates; with --eval_strategy steps|epoch they are measured while training")
    watch: str = _flag(
        "", "module:function that grades greedy answers to 32 prompts of --eval_data at each measurement"
    )
    method: str = _flag("rank", "rank (any ranking loss), sft (the best response alone), reward (a reward model), ppo")
    loss: str = _flag("rrhf", "a name of `rankalign ls losses`; for reward bradley_terry, plackett_luce, per_token")
    loss_options: str = _flag("{}", "more keywords of the loss: a JSON object, or a mapping in YAML")
    rrhf_weight: float | None = _flag(None, "weight of RRHF's rank term beside its SFT term (paper: 1)")
    length_penalty: float | None = _flag(None, "RRHF: log-probabilities are divided by length to this power (1)")
    beta: float | None = _flag(None, "strength of the pull to the reference in DPO and its relatives")
    judge: str = _flag("", "whose scores rank the candidates; needed only where several judges scored")
    template: str = _flag("auto", "prompt format: auto, chat, alpaca, vicuna, hh, raw")
    system: str = _flag("", "system message put before each prompt")
    max_length: int = _flag(512, "most tokens of prompt and response together")
    max_candidates: int = _flag(0, "candidates a prompt, spread over its ranking; 0 takes all")
    only_use_provide: bool = _flag(False, "only the last two responses of each prompt (RRHF's setting P)")
    only_use_sample: bool = _flag(False, "all but the last two responses (RRHF's settings D and B)")
    stop_response: bool = _flag(False, "cut responses at the marks of HH dialogues")
    skip_invalid: bool = _flag(False, "leave bad lines of the data out, with their count, instead of stopping")
    ignore_columns: str = _flag("", "columns of the data that may stay unread, comma-separated, or `all`")
    add_tokens: str = _flag("", "special tokens to add, comma-separated; new rows start at the mean of the old ones")
    layout: str = _flag("auto", "tree (prompts shared, nothing padded), padded, or auto")
    token_budget: int = _flag(4096, "most tokens run at once; longer micro-batches run in parts, with the same result")
    two_pass: str = _flag(
        "auto",
        "two backward passes, memory flat in the candidates: always, never, or auto where a list exceeds the budget",
    )
    use_lora: bool = _flag(False, "train a LoRA adapter instead of all weights; where --model is one, train it on")
    use_dora: bool = _flag(False, "with --use_lora: DoRA, which also learns the length of each weight column")
    load_in_4bit: bool = _flag(False, "with --use_lora: frozen weights in 4 bits (nf4, QLoRA), by bitsandbytes")
    load_in_8bit: bool = _flag(False, "with --use_lora: frozen weights in 8 bits, by bitsandbytes")
    lora_r: int = _flag(16, "rank of the adapter")
    lora_alpha: int = _flag(32, "scale of the adapter")
    lora_dropout: float = _flag(0.0, "dropout inside the adapter")
    lora_target_modules: str = _flag(
        "auto", "modules to adapt, comma-separated; auto takes all linear ones but the head"
    )
    freeze_layers: float = _flag(0.0, "reward: share of the lower layers, and the embeddings, that stay as they are")
    early_stopping: int = _flag(0, "stop after so many measurements without a better one; 0 does not")
    disable_dropout: bool = _flag(True, "switch the model's own dropout off, so that log-probabilities are exact")
    resume: bool = _flag(True, "go on from the newest checkpoint in output_dir where there is one")
    overwrite: bool = _flag(False, "start over even where output_dir holds a finished or begun run")

    # Defaults that differ from transformers': those of RRHF's own command line, and no log line lost.
    output_dir: str | None = _flag("runs/rrhf", "where checkpoints, log.jsonl, the final model and the manifest go")
    learning_rate: float = _flag(2e-5, "peak learning rate")
    lr_scheduler_type: str = _flag("cosine", "schedule")
    warmup_steps: float = _flag(0.03, "warm-up: steps, or a share of all steps where below 1")
    per_device_train_batch_size: int = _flag(4, "prompts a micro-batch, each with all its candidates")
    gradient_accumulation_steps: int = _flag(2, "micro-batches an update")
    logging_steps: float = _flag(1, "steps between log lines")
    save_steps: float = _flag(100, "steps between checkpoints")
    save_total_limit: int | None = _flag(2, "checkpoints to keep")
    ddp_find_unused_parameters: bool | None = _flag(False, "off: every weight takes part in every update")
    remove_unused_columns: bool = _flag(False, "must stay off: batches are token lists")
    logging_nan_inf_filter: bool = _flag(False, "off: a loss that is not finite is an error here, not a gap in the log")

    def __post_init__(self) -> None:
        if self.method == "reward":
            self._set_reward_defaults()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # else accelerate finds nothing that processes could talk over
        super().__post_init__()  # type: ignore[no-untyped-call]
        self._check_launch()
        self._check_adapter()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        if self.method not in METHODS:
            raise InputError(f"unknown method {self.method!r}{did_you_mean(self.method, METHODS)}")
        if self.method == "sft":
            self.loss = "sft"
        if self.loss not in self._losses:
            raise InputError(f"unknown loss {self.loss!r}{did_you_mean(self.loss, self._losses)}")
        if self.add_tokens and self.method == "reward":
            raise InputError("--add_tokens is for models that write: method rank, sft or ppo")
        if self.early_stopping and not self.load_best_model_at_end:
            raise InputError("--early_stopping needs --load_best_model_at_end True (and --eval_data, --eval_strategy)")
        if not 0 <= self.freeze_layers <= 1 or (self.freeze_layers and self.method != "reward"):
            raise InputError("--freeze_layers is a share from 0 to 1, for --method reward")
        if self.two_pass not in TWO_PASS:
            raise InputError(f"unknown --two_pass {self.two_pass!r} (one of: {', '.join(TWO_PASS)})")
        if self.two_pass == "always" and not self.can_two_pass:
            raise InputError("--two_pass always needs log-probabilities (not --method reward) and no dropout")
        watched = "--watch" if self.watch else "the best checkpoint by ROUGE" if self.best_by_rouge else ""
        if watched and (self.method == "reward" or self.eval_strategy == "no" or not self.eval_data or self.fsdp):
            raise InputError(f"{watched} needs --eval_strategy and --eval_data, a model that answers, and no --fsdp")
        if self.token_budget < 1:
            raise InputError("--token_budget must be at least 1")
        if self.only_use_provide and self.only_use_sample:
            raise InputError("--only_use_provide and --only_use_sample leave no response between them; choose one")
        self.loss_keywords()

    def _check_launch(self) -> None:
        """Refuse what would change the result or do nothing without a word."""
        if self.torch_compile:
            raise InputError("--torch_compile would do nothing: rows do not pass through the compiled forward")
        told: Any = self.accelerator_config
        if told.split_batches or told.dispatch_batches or not told.even_batches:
            raise InputError("accelerator_config: split_batches, dispatch_batches and even_batches stay as they are")
        if (self.watch or self.best_by_rouge) and self.deepspeed_plugin is not None:
            raise InputError("--watch and ROUGE need a model that answers, which one sharded by DeepSpeed does not")
        self._n_gpu = min(self.n_gpu, 1)  # one process drives one GPU; several GPUs take a launcher

    def _check_adapter(self) -> None:
        if self.use_dora and (not self.use_lora or self.method == "ppo"):
            raise InputError("--use_dora is a kind of --use_lora: give both (and not with --method ppo)")
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("--load_in_4bit and --load_in_8bit exclude each other")
        if self.quantised and (not self.use_lora or self.method in ("reward", "ppo")):
            raise InputError(f"--load_in_{self.quantised}bit needs --use_lora and method rank or sft")
        if self.quantised and (self.deepspeed_plugin is not None or self.fsdp_plugin_args):
            raise InputError(
                f"--load_in_{self.quantised}bit works with one process or DDP, not where weights are sharded"
            )

    @property
    def quantised(self) -> int:
        """Bits of the frozen weights, 4 or 8; 0 where they are whole."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else 0

    def _set_reward_defaults(self) -> None:
        if self.loss == TrainConfig.loss:
            self.loss = "bradley_terry"
        if self.load_best_model_at_end and not self.metric_for_best_model:
            self.metric_for_best_model = "ranking_accuracy"

    @property
    def can_two_pass(self) -> bool:
        """Whether two passes give one gradient: dropout would draw another mask in each."""
        return self.method != "reward" and self.disable_dropout and not self.lora_dropout

    @property
    def best_by_rouge(self) -> bool:
        """Whether the best checkpoint is the one whose answers come closest to the held-out best responses."""
        return (self.metric_for_best_model or "").removeprefix("eval_") in ROUGE

    @property
    def lora_targets(self) -> str | list[str]:
        """``auto``, or the names of the modules to adapt."""
        return "auto" if self.lora_target_modules == "auto" else self.lora_target_modules.split(",")

    @property
    def _losses(self) -> dict[str, Loss]:
        return REWARD_LOSSES if self.method == "reward" else LOSSES

    @property
    def loss_entry(self) -> Loss:
        """The loss by its name, among those of the method."""
        return self._losses[self.loss]

    def loss_keywords(self) -> dict[str, Any]:
        """Keywords the loss is called with.

        Raises:
            InputError: one that this loss does not have.
        """
        named = {name: getattr(self, name) for name in ("rrhf_weight", "length_penalty", "beta")}
        given = {
            **_json_object(self.loss_options),
            **{name: value for name, value in named.items() if value is not None},
        }
        known = self.loss_entry.defaults
        for name in given:
            if name not in known:
                raise InputError(f"loss {self.loss!r} has no option {name!r}{did_you_mean(name, known)}")
        return given

    def own_settings(self) -> dict[str, Any]:
        """The settings that decide the result: all of ours, and the optimiser's, as plain values."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in _BASE or f.name in _DECISIVE]
        skip = {"output_dir", "overwrite", "resume", "watch", "logging_nan_inf_filter", "remove_unused_columns"}
        plain = {name: getattr(self, name) for name in names if name not in skip}
        return {name: getattr(value, "value", value) for name, value in plain.items()}


@dataclass
class PPOConfig(PPOSettings, TrainConfig):
    """Everything a PPO run depends on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        own = {f.name for f in dataclasses.fields(TrainConfig)} & set(FOREIGN)
        for name in sorted(name for name in own if getattr(self, name) != getattr(TrainConfig, name)):
            raise InputError(f"--method ppo does not read --{name}")
        self.check_ppo()
        _json_object(self.reward_options)

    def own_settings(self) -> dict[str, Any]:
        """The settings that decide the result, as plain values."""
        return {name: value for name, value in super().own_settings().items() if name not in FOREIGN}


_BASE = {f.name for f in dataclasses.fields(TrainingArguments)}
_DECISIVE = {
    "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "weight_decay", "optim",
    "per_device_train_batch_size", "gradient_accumulation_steps", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "seed", "data_seed", "bf16", "fp16", "tf32", "train_sampling_strategy",
    "load_best_model_at_end", "metric_for_best_model",
}  # fmt: skip

# --- reading settings ------------------------------------------------------------------------------------------------


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = loads(text)
    except ValueError as error:
        raise InputError(f"loss_options: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"loss_options: expected a JSON object, found {text}")
    return value


def split_flags(argv: list[str]) -> dict[str, Any]:
    """``--key value`` and ``--key=value`` as a mapping; a flag with nothing behind it is True.

    Raises:
        InputError: a word that belongs to no flag.
    """
    flags: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise InputError(f"unexpected argument {word!r}; settings are written --name value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            has_value = bool(words) and not words[0].startswith("--")
            value = words.pop(0) if has_value else "True"
        flags[key.replace("-", "_")] = value
    return flags


def parse(config: str | None, argv: list[str]) -> tuple[TrainConfig, list[str]]:
    """Default, then YAML file, then flags.

    Returns:
        The settings and notes on old names for the user to see.

    Raises:
        InputError: an unknown key with the nearest known one, or a value that does not fit.
    """
    yaml_settings, notes = modernise(read_yaml(config) if config else {})
    flags, more = modernise(split_flags(argv))
    _check_names(yaml_settings, str(config))
    _check_names(flags, "the command line")
    return _build({**yaml_settings, **flags}), notes + more


def parse_settings(content: dict[str, Any], where: str = "train") -> TrainConfig:
    """Settings from a mapping under their present names."""
    _check_names(content, where)
    return _build(content)


def _check_names(content: dict[str, Any], where: str) -> None:
    known = [f.name for f in dataclasses.fields(PPOConfig) if f.init]
    for key in content:
        if key not in known:
            raise InputError(f"{where}: unknown setting {key!r}{did_you_mean(key, known)}")


def _as_words(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, dict):
        value = dumps(value)
    return [f"--{key}", *map(str, value if isinstance(value, list) else [value])]


def _kind(content: dict[str, Any]) -> type[TrainConfig]:
    """The settings' class; those of PPO with another method are a mistake."""
    if content.get("method") == "ppo":
        return PPOConfig
    common = {f.name for f in dataclasses.fields(TrainConfig)}
    for key in content:
        if key not in common:
            raise InputError(f"--{key} is a setting of --method ppo")
    return TrainConfig


def _build(content: dict[str, Any]) -> TrainConfig:
    words = [word for key, value in content.items() for word in _as_words(key, value)]
    parser = HfArgumentParser(_kind(content), exit_on_error=False, allow_abbrev=False)  # type: ignore[arg-type]
    try:
        return parser.parse_args_into_dataclasses(words)[0]
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"the training settings do not fit: {error or words}") from error


def describe(out: Any = sys.stdout) -> None:
    """Print our own flags with defaults and help."""
    for item in dataclasses.fields(TrainConfig):
        if "help" in item.metadata and (item.name not in _BASE or item.name in _DECISIVE):
            _describe(item, out)
    print("\nof --method ppo:", file=out)
    for item in dataclasses.fields(PPOSettings):
        _describe(item, out)


def _describe(item: dataclasses.Field[Any], out: Any) -> None:
    default = item.default if item.default is not dataclasses.MISSING else ""
    print(f"  --{item.name:<30} {item.metadata['help']} [{default}]", file=out)

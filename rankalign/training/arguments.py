"""Settings of ``rankalign train``: our own flags beside every flag of transformers' TrainingArguments."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import HfArgumentParser, TrainingArguments

from rankalign.config import read_yaml
from rankalign.errors import InputError
from rankalign.losses import LOSSES, Loss
from rankalign.losses.mixtures import compose
from rankalign.losses.reward import REWARD_LOSSES
from rankalign.models import devices
from rankalign.registry import did_you_mean
from rankalign.storage.code import hash_of, is_code
from rankalign.storage.jsonl import dumps, loads
from rankalign.training import processes
from rankalign.training.defaults import choose
from rankalign.training.identity import identity
from rankalign.training.measures import WATCHED, measured_names
from rankalign.training.old_names import modernise
from rankalign.training.ppo_settings import FOREIGN, PPOSettings
from rankalign.training.router_loss import check_coefficient
from rankalign.training.settings import (
    GROUPS,
    METHODS,
    DataSettings,
    LossSettings,
    ModelSettings,
    RunSettings,
    json_object,
)
from rankalign.training.trainer_flags import check_flags, check_optimiser

SEVERAL = ("loss", "loss_type", "loss_weights")
ROUGE = ("rouge1", "rouge2", "rougeL")
Class = TypeVar("Class")
Group = TypeVar("Group")


def _made_of(groups: tuple[type[Any], ...]) -> Callable[[type[Class]], type[Class]]:
    """A dataclass that has the fields of the groups as fields of its own, so that each is one flag and one YAML key."""

    def build(kind: type[Class]) -> type[Class]:
        # Flat, because HfArgumentParser makes no flags of a dataclass inside a dataclass.
        for item in [item for group in groups for item in dataclasses.fields(group)]:
            kind.__annotations__[item.name] = item.type
            setattr(kind, item.name, dataclasses.field(default=item.default, metadata=item.metadata))
        return dataclass(kind)

    return build


@_made_of(GROUPS)
class TrainConfig(TrainingArguments):
    """Everything a training run depends on: the groups of :mod:`rankalign.training.settings`, flat, and transformers'
    arguments. Functions take the group that they read."""

    if TYPE_CHECKING:  # fields of the groups

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __post_init__(self) -> None:
        check_flags(self)
        if self.method == "reward":
            self._set_reward_defaults()  # before transformers puts `loss` where no metric is named
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # else accelerate finds nothing that processes could talk over
        if self.method == "sft":
            self.loss = "sft"
        devices.stay_on_cpu(self.use_cpu)
        # Whether layers run again is left to :mod:`rankalign.training.plan` where neither name of the flag is given.
        newer = getattr(self, "activation_checkpointing", None)  # the transformers that vLLM pins has the older alone
        self.may_checkpoint = newer is None and self.gradient_checkpointing is TrainingArguments.gradient_checkpointing
        self.loss_settings  # noqa: B018 - refuses an unknown method or loss before a rate is looked up for it
        self.chosen = choose(self)
        self.asked_data = self.data  # `data` becomes a path; a card names what was asked for
        self._take_compile()
        self._take_hub()
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.torch_compile = self.compiled_by is not None
        self._check_launch()
        self._check_adapter()
        # Pinning without a GPU does nothing but warn.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        self._check_method()
        check_optimiser(self)
        measured = measured_names(self.loss_settings)  # also a trial of the loss and its keywords
        self._check_metric(measured)

    def _take_compile(self) -> None:
        """Keep ``--torch_compile`` from accelerate, which would compile the model's forward: rows do not pass it."""
        asked = self.torch_compile or self.torch_compile_backend or self.torch_compile_mode
        self.compiled_by = (self.torch_compile_backend or "inductor", self.torch_compile_mode) if asked else None
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None

    def _take_hub(self) -> None:
        """Keep ``--push_to_hub`` from transformers, which would push whatever stands in the folder."""
        if not self.push_to_hub and (self.hub_model_id or self.hub_private_repo):
            raise InputError("--hub_model_id and --hub_private_repo do nothing without --push_to_hub True")
        name = self.hub_model_id or Path(str(self.output_dir)).name
        self.publish = (str(name), bool(self.hub_private_repo)) if self.push_to_hub else None
        self.push_to_hub, self.hub_model_id, self.hub_private_repo = False, None, None

    @property
    def model_settings(self) -> ModelSettings:
        """What is trained."""
        return self._group(ModelSettings)

    @property
    def data_settings(self) -> DataSettings:
        """What is read."""
        return self._group(DataSettings)

    @property
    def loss_settings(self) -> LossSettings:
        """What is learned."""
        return self._group(LossSettings)

    @property
    def run_settings(self) -> RunSettings:
        """How the run goes."""
        return self._group(RunSettings)

    def _group(self, kind: type[Group]) -> Group:
        names = [item.name for item in dataclasses.fields(kind)]  # type: ignore[arg-type]
        return kind(**{name: getattr(self, name) for name in names})

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Updates of the warm-up, which begins at a rate of 0; none in a run of one update, which would learn
        nothing."""
        steps = int(super().get_warmup_steps(num_training_steps))
        if steps and num_training_steps == 1:
            print("a run of one update has no warm-up: it is made at the full learning rate", file=sys.stderr)
            return 0
        return steps

    @property
    def precision(self) -> str:
        """Numerics of the forward pass: ``bf16``, ``fp16`` or ``float32``."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "float32"

    @property
    def rounding(self) -> torch.dtype | None:
        """The 16-bit type that layers compute in; None where it is float32."""
        narrow = "bfloat16" if self.bf16 or self.weights_dtype == "bfloat16" else "float16" if self.fp16 else ""
        return devices.DTYPES[narrow] if narrow else None

    @property
    def compensated(self) -> bool:
        """Whether the optimiser keeps what 16-bit weights lose of an update, and adds it to the next (Kahan 1965)."""
        return getattr(self.optim, "value", self.optim) == "stable_adamw"

    @property
    def weights_dtype(self) -> str:
        """The type in which weights are held while training: in 16 bits, by itself, only what is frozen."""
        light = self.use_lora and self.bf16 and devices.device().type == "cuda" and not self.sharded
        return str(self.dtype) if self.dtype != "auto" else "bfloat16" if light else "float32"

    @property
    def sharded(self) -> bool:
        """Whether weights, gradients or the optimiser's state are to be spread over the processes."""
        return self.deepspeed_plugin is not None or bool(self.fsdp_plugin_args)

    def _check_method(self) -> None:
        """Refuse settings that do not go together, each group first by itself."""
        groups = self.loss_settings, self.data_settings, self.run_settings
        reward = groups[0].grades
        if self.add_tokens and reward:
            raise InputError("--add_tokens is for models that write: method rank, sft or ppo")
        if self.early_stopping and not self.load_best_model_at_end:
            raise InputError("--early_stopping needs --load_best_model_at_end True (and --eval_data, --eval_strategy)")
        if not 0 <= self.freeze_layers <= 1 or (self.freeze_layers and not reward):
            raise InputError("--freeze_layers is a share from 0 to 1, for --method reward")
        if self.pooling and (not reward or self.use_lora):
            why = "an adapter has no config that could say it" if reward else "nothing else has a head that pools"
            raise InputError(f"--pooling is for --method reward without --use_lora: {why}")
        if self.axes and (not reward or self.loss != "quality" or self.use_lora):
            why = (
                "an adapter has no config that could say it" if reward and self.use_lora else "no other loss reads them"
            )
            raise InputError(f"--axes is for --method reward --loss quality without --use_lora: {why}")
        if self.thoughts == "mask" and self.method not in ("rank", "sft"):
            raise InputError(
                "--thoughts mask is for --method rank or sft: others learn no tokens of answers in the data"
            )
        check_coefficient(self)
        if self.two_pass == "always" and not self.can_two_pass:
            raise InputError("--two_pass always needs log-probabilities (not --method reward) and no dropout")
        watched = "--watch" if self.watch else "the best checkpoint by ROUGE" if self.best_by_rouge else ""
        blind = self.eval_strategy == "no" or not (self.eval_data or self.eval_split)
        if watched and (reward or blind or processes.fsdp_version(self)):
            raise InputError(f"{watched} needs --eval_strategy and --eval_data, a model that answers, and no --fsdp")

    def _check_metric(self, known: Collection[str]) -> None:
        """Refuse a best checkpoint by what no measurement gives."""
        metric, best = self.metric_for_best_model, self.save_strategy == "best"
        if best and (not metric or self.eval_strategy == "no"):
            raise InputError("--save_strategy best needs --metric_for_best_model, --eval_strategy and --eval_data")
        if not metric:
            return
        known = {*known, *ROUGE, *(WATCHED if self.watch else ())}
        name = metric.removeprefix("eval_")
        if name not in known:
            raise InputError(f"--metric_for_best_model {metric}: no measurement gives it{did_you_mean(name, known)}")

    def _check_launch(self) -> None:
        """Refuse what would change the result or do nothing without a word."""
        told: Any = self.accelerator_config
        if told.split_batches or told.dispatch_batches or not told.even_batches:
            raise InputError("accelerator_config: split_batches, dispatch_batches and even_batches stay as they are")
        if (self.watch or self.best_by_rouge) and self.deepspeed_plugin is not None:
            raise InputError("--watch and ROUGE need a model that answers, which one sharded by DeepSpeed does not")
        if self.batch_by == "tokens" and processes.asked_to_shard(self):
            raise InputError("--batch_by tokens works with one process or DDP, not where weights are sharded")
        if self.loss_entry.needs_kls and processes.asked_to_shard(self):
            raise InputError(
                f"loss {self.loss!r} runs the reference beside the policy: one process or DDP, not sharded weights"
            )
        if self.sync_ref_model and (self.references == "before" or processes.asked_to_shard(self)):
            raise InputError("--sync_ref_model: whole weights, on one process or DDP, and not --references before")
        self._n_gpu = min(self.n_gpu, 1)  # one process drives one GPU; several GPUs take a launcher

    def _check_adapter(self) -> None:
        bits = self.model_settings.quantised
        if self.use_dora and self.method == "ppo":
            raise InputError("--use_dora is a kind of --use_lora: give both (and not with --method ppo)")
        if bits and self.method in ("reward", "ppo"):
            raise InputError(f"--load_in_{bits}bit needs --use_lora and method rank or sft")
        if self.dtype == "bfloat16" and self.sharded and (self.use_lora or self.method == "reward"):
            beside = "--use_lora" if self.use_lora else "--method reward"  # whose own weights are float32
            raise InputError(f"--dtype bfloat16 with {beside} works with one process or DDP: shards are of one type")
        if self.torch_compile and (bits or self.sharded):
            raise InputError("--torch_compile works with one process or DDP, and with weights of 16 bits or more")
        if bits and self.sharded:
            raise InputError(f"--load_in_{bits}bit works with one process or DDP, not where weights are sharded")

    def _set_reward_defaults(self) -> None:
        if self.loss == LossSettings.loss:
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
    def loss_entry(self) -> Loss:
        """The loss by its name, among those of the method."""
        return self.loss_settings.entry

    def loss_keywords(self) -> dict[str, Any]:
        """Keywords the loss is called with, see :meth:`rankalign.training.settings.LossSettings.keywords`."""
        return self.loss_settings.keywords()

    def own_settings(self) -> dict[str, Any]:
        """The settings that decide the result, see :func:`rankalign.training.identity.identity`."""
        compiled = {"torch_compile": list(self.compiled_by)} if self.compiled_by else {}
        code = {"loss_sha256": told} if (told := self.loss_settings.code) else {}
        if is_code(self.format):
            code["format_sha256"] = {self.format: hash_of(self.format)}
        return identity(self) | compiled | code


@dataclass
class PPOConfig(PPOSettings, TrainConfig):
    """Everything a PPO run depends on."""

    def __post_init__(self) -> None:
        own = {f.name for f in dataclasses.fields(TrainConfig)} & set(FOREIGN)
        for name in sorted(name for name in own if getattr(self, name) != getattr(TrainConfig, name)):
            raise InputError(f"--method ppo does not read --{name}")
        super().__post_init__()
        self.check_ppo()
        json_object(self.reward_options)

    def own_settings(self) -> dict[str, Any]:
        """The settings that decide the result, as plain values."""
        return {name: value for name, value in super().own_settings().items() if name not in FOREIGN}


# --- reading settings ------------------------------------------------------------------------------------------------


def split_flags(argv: list[str]) -> dict[str, Any]:
    """``--key value`` and ``--key=value`` as a mapping; a flag with nothing behind it is True. The losses of a mixture
    and their weights may follow one another, as in TRL: those are lists.

    Raises:
        InputError: a word that belongs to no flag.
    """
    flags: dict[str, Any] = {}
    words = list(argv)
    value: Any
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise InputError(f"unexpected argument {word!r}; settings are written --name value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            has_value = bool(words) and not words[0].startswith("--")
            value = words.pop(0) if has_value else "True"
            if key in SEVERAL and words and not words[0].startswith("--"):
                value = [value, *_words_of_flag(words)]
        flags[key.replace("-", "_")] = value
    return flags


def _words_of_flag(words: list[str]) -> list[str]:
    """Take the words up to the next flag."""
    taken = list(itertools.takewhile(lambda word: not word.startswith("--"), words))
    del words[: len(taken)]
    return taken


def parse(config: str | None, argv: list[str]) -> tuple[TrainConfig, list[str]]:
    """Default, then YAML file, then flags.

    Returns:
        The settings and notes on old names for the user to see.

    Raises:
        InputError: an unknown key with the nearest known one, or a value that does not fit.
    """
    yaml_settings, notes = modernise(read_yaml(config) if config else {})
    flags, more = modernise(split_flags(argv))
    content, moved = keywords_to_loss({**yaml_settings, **flags})
    _check_names({key: value for key, value in yaml_settings.items() if key in content}, str(config))
    _check_names({key: value for key, value in flags.items() if key in content}, "the command line")
    return _build(content), notes + more + moved


def parse_settings(content: dict[str, Any], where: str = "train") -> TrainConfig:
    """Settings from a mapping under their present names; nothing is published by those who train in this way.

    Raises:
        InputError: an unknown key, a value that does not fit, or ``push_to_hub``.
    """
    content, _ = keywords_to_loss(content)
    _check_names(content, where)
    config = _build(content)
    if config.publish:
        raise InputError(f"{where}: push_to_hub is for one `rankalign train`; else: rankalign push DIR REPO")
    return config


def _check_names(content: dict[str, Any], where: str) -> None:
    known = [f.name for f in dataclasses.fields(PPOConfig) if f.init]
    for key in content:
        if key not in known:
            raise InputError(f"{where}: unknown setting {key!r}{did_you_mean(key, known)}")


def keywords_to_loss(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Keywords of the loss that stand among the settings, put into ``loss_options``; and a note on each. A list of
    losses becomes one text.

    Raises:
        InputError: one that this loss does not have though others do, or one that is given both ways.
    """
    method = content.get("method", "rank")
    if method not in METHODS or method == "ppo":
        return content, []
    content = _losses_to_text(content)
    own = {item.name for item in dataclasses.fields(TrainConfig)}
    losses = REWARD_LOSSES if method == "reward" else LOSSES
    name = "sft" if method == "sft" else content.get("loss", "bradley_terry" if method == "reward" else "rrhf")
    having = {key: [loss for loss, entry in losses.items() if key in entry.defaults] for key in content}
    try:
        known = LossSettings(method=method, loss=name).entry.defaults
    except InputError:  # an unknown loss, which is refused with all that is known about it when the settings are built
        return content, []
    keys = [key for key in content if key not in own and (having[key] or key in known or "." in key)]
    if not keys:
        return content, []
    options = _options(content)
    for key in keys:
        if key not in known:
            also = ", and --method ppo has" if key in {item.name for item in dataclasses.fields(PPOSettings)} else ""
            raise InputError(f"--{key}: loss {name!r} has no such option; {', '.join(having[key])} have{also}")
        if key in options:
            raise InputError(f"--{key} stands in --loss_options too; give it once")
        options[key] = _number_or_word(content[key])
    rest = {key: value for key, value in content.items() if key not in keys}
    notes = [f"--{key} {content[key]} is an option of loss {name!r}: --loss_options" for key in keys]
    return {**rest, "loss_options": dumps(options)}, notes


def _options(content: dict[str, Any]) -> dict[str, Any]:
    """The keywords of the loss, as a mapping or a JSON object."""
    given = content.get("loss_options") or {}
    return dict(given) if isinstance(given, dict) else json_object(str(given))


def _losses_to_text(content: dict[str, Any]) -> dict[str, Any]:
    """A list of losses, with its weights, as the text of a mixture; what its entries say goes to ``loss_options``."""
    listed, weights = content.get("loss"), content.get("loss_weights")
    if weights is None and not isinstance(listed, list):
        return {key: value for key, value in content.items() if key != "loss_weights"}
    text, own = compose(*(_as_list(value) for value in (listed, weights)))
    rest = {key: value for key, value in content.items() if key != "loss_weights"} | {"loss": text}
    return rest | {"loss_options": dumps({**own, **_options(content)})} if own else rest


def _as_list(value: Any) -> Any:
    """TRL's lists come as a list, as one value, or as one text in JSON."""
    value = _number_or_word(value)
    return value if isinstance(value, list) or value is None else [value]


def _number_or_word(value: Any) -> Any:
    try:
        return loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


_WITH_COMMAS = ("lora_target_modules", "ignore_columns")
_ONE = ("data", "eval_data")


def _as_words(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, dict):
        value = dumps(value)
    if isinstance(value, list) and key in _WITH_COMMAS:
        value = ",".join(map(str, value))
    if isinstance(value, list) and key in _ONE and len(value) != 1:
        raise InputError(
            f"--{key} takes one file, folder or pattern, found {len(value)}; `rankalign convert A B OUT` joins several"
        )
    if value is False and key.endswith("_strategy"):
        value = "no"  # YAML 1.1 reads a bare `no` as a truth value
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
    except (Exception, SystemExit) as error:  # argparse still exits on some mistakes
        said = " ".join(str(error or words).split())
        raise InputError(f"the training settings do not fit: {said}") from error

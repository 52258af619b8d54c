"""Policies, reward models and tokenizers: names resolved, weights loaded and fingerprinted, adapters and tokens added.

Padding: many tokenizers (the default model's among them) pad with their end-of-sequence token, so a token id never says
what is padding. Collators must mask by length, or a model never learns to stop.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_session, snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from rankalign.errors import InputError
from rankalign.models import default as default_model
from rankalign.models import quant, reward_heads, saving, tiny, value_heads, weights
from rankalign.models.devices import DTYPES as DTYPES
from rankalign.models.devices import check_device_map as check_device_map
from rankalign.models.devices import device as device
from rankalign.models.devices import over_devices as over_devices
from rankalign.models.devices import pick_dtype as pick_dtype
from rankalign.models.devices import stay_on_cpu as stay_on_cpu
from rankalign.storage.files import cache_dir as cache_dir
from rankalign.storage.folders import cached_folder

# A bar for each loading of weights is noise between our own lines.
hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]

PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")


# --- names and the cache -----------------------------------------------------------------------------------------


def resolve(model: str) -> str:
    """The folder or hub id behind a model's name.

    ``default`` is the embedded SmolLM2-135M-Instruct (fetched and converted on first use), ``tiny`` and ``tiny-rm`` a
    policy and a reward model made in code; anything else is a folder or a hub id and comes back as it is.
    ``$RANKALIGN_DEFAULT_MODEL`` puts another model in the place of ``default``.

    Raises:
        InputError: a path that leads nowhere, or a default model that cannot be had.
    """
    if model == "default":
        model = os.environ.get("RANKALIGN_DEFAULT_MODEL") or model
    if model in _MADE_HERE:
        return str(_cached(model, cache_dir()))
    if not model:
        raise InputError("no model is named; give default, tiny, a folder or a hub id")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists():
        raise InputError(f"model {model}: is a file; a folder with config.json and safetensors weights is needed")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", model):
        raise InputError(f"model {model}: no such folder")
    return model


def _tiny_name(kind: str) -> str:
    """Changes with the code that builds the model, so that an edit never meets yesterday's bytes."""
    return f"{kind}-{hashlib.sha256(Path(tiny.__file__).read_bytes()).hexdigest()[:8]}"


_MADE_HERE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "default": (default_model.NAME, default_model.save),
    "tiny": (_tiny_name("tiny"), tiny.save_policy),
    "tiny-rm": (_tiny_name("tiny-rm"), tiny.save_reward_model),
}


@functools.cache
def _cached(model: str, cache: Path) -> Path:
    name, build = _MADE_HERE[model]
    return cached_folder(cache / name, build)


# --- loading -----------------------------------------------------------------------------------------------------


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or adapter, its vocabulary untouched, with a padding token.

    A missing padding token is set to one that the vocabulary has: a known name, the unknown token, or end of sequence.
    """
    where = resolve(model)
    if _is_adapter(where) and not (Path(where) / "tokenizer_config.json").exists():
        where = resolve(_base_of(where))
    with explained(where):
        tokenizer = AutoTokenizer.from_pretrained(_source(where))
    if tokenizer.pad_token_id is None:
        known = tokenizer.get_vocab()
        named = next((name for name in PAD_NAMES if name in known), None)
        tokenizer.pad_token = named or tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError(f"model {model}: its tokenizer names no padding, unknown or end-of-sequence token")
    return tokenizer


def load_policy(
    model: str,
    *,
    dtype: str = "auto",
    adapter: str = "",
    trust_remote_code: bool = False,
    bits: int = 0,
    train_adapter: bool = False,
    quantize: str = "",
    device_map: str = "",
) -> PreTrainedModel:
    """A causal language model in eval mode on :func:`device`.

    Args:
        model: ``default``, ``tiny``, a folder, a hub id, or the folder of a LoRA adapter (then its base is loaded too).
        dtype: ``auto`` (float32 on the CPU, where narrower types are slow; bfloat16 on a GPU), or a name in DTYPES.
        adapter: folder of a LoRA adapter to put on the model, as a ``PeftModel`` in which it can be disabled.
        trust_remote_code: run Python code that comes with the model.
        bits: 4 or 8 quantises the linear layers but the head (see :func:`quantisation`); 0 leaves them whole.
        train_adapter: let the adapter's weights train on.
        quantize: ``8bit`` holds linear layers and embeddings in 8 bits, for inference only
            (:mod:`rankalign.models.quant`); they are read in the type of their file, so that they never stand in
            memory at full width.
        device_map: one of :data:`rankalign.models.devices.DEVICE_MAPS` lays the layers over all GPUs, for inference.

    Raises:
        InputError: the model cannot be had, the device cannot compute in ``dtype``, or ``quantize`` is unknown.
    """
    if quantize not in ("", "8bit"):
        raise InputError(f"unknown quantisation {quantize!r}: give 8bit or nothing")
    where, adapter = base_and_adapter(model, adapter)
    more = quantisation(bits, pick_dtype(dtype)) if bits else over_devices(device_map)
    stored: torch.dtype | str = "auto" if quantize else pick_dtype(dtype)
    policy = load_whole_policy(where, stored, trust_remote_code=trust_remote_code, **more)
    train_every_row(policy)
    _one_kernel(policy)
    policy = with_adapter(policy, adapter, is_trainable=train_adapter) if adapter else policy
    if quantize:
        quant.quantize_8bit(policy, pick_dtype(dtype))
    placed: PreTrainedModel = (policy if more else policy.to(device())).eval()  # others lie where they belong already
    return placed


def _one_kernel(model: PreTrainedModel) -> None:
    """Keep 4-bit layers on CPUs from bfloat16 in eval mode alone, so that a reference is what training sees."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def quantisation(bits: int, compute: torch.dtype) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for linear layers in 4 bits (nf4 with double quantisation, QLoRA of
    arXiv:2305.14314) or 8 bits (LLM.int8, arXiv:2208.07339), multiplied in ``compute``.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"weights in {bits} bits need: pip install 'rankalign[quant]'")
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute}
    make: Any = BitsAndBytesConfig
    config = make(load_in_4bit=True, **four) if bits == 4 else make(load_in_8bit=True)
    return {"quantization_config": config, "device_map": {"": device()}}


def train_every_row(model: PreTrainedModel) -> None:
    """Let the embedding of the padding token learn: often it is the end of sequence, which stands in prompts too."""
    embedding: Any = model.get_input_embeddings()
    embedding.padding_idx = None


def load_reward_model(
    model: str, *, dtype: str = "auto", new_head: bool = True, outputs: int = 1, device_map: str = ""
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier with one output, or several, in eval mode on :func:`device`, and its tokenizer.

    transformers reads the output at the last token whose id is not the padding id. Where padding is also the end of
    sequence that is the token before the end, in training and in use alike.

    Args:
        model: a reward model or its adapter; or any policy, which then gets a new random head, said on stderr.
        dtype: as in :func:`load_policy`.
        new_head: False refuses a model without a head: a random one must never grade.
        outputs: of the head; 0 takes as many as it has.
        device_map: as in :func:`load_policy`.

    Raises:
        InputError: it cannot be loaded, has no head, or one of another number of outputs.
    """
    tokenizer = load_tokenizer(model)
    where, adapter = base_and_adapter(model, "")
    own_head = value_heads.has_value_head(where) or reward_heads.is_gated(where)
    if own_head and device_map:
        raise InputError(f"model {model}: its head is not transformers' own, and takes no device_map")
    if reward_heads.is_gated(where):
        if new_head or adapter:
            raise InputError(f"model {model}: a reward model with a gate scores, and is not trained on")
        return reward_heads.load(where, pick_dtype(dtype), tokenizer, outputs).to(device()).eval(), tokenizer
    if own_head:
        reward, missing = value_heads.load(where, pick_dtype(dtype)), list[str]()
    else:
        more = {**_labels(outputs), **over_devices(device_map)}
        reward, missing = load_as(AutoModelForSequenceClassification, where, pick_dtype(dtype), **more)
    if new_head and isinstance(getattr(reward, "score", None), nn.Sequential):
        raise InputError(f"model {model}: a head of several layers scores, and is not trained on")
    if missing and not adapter:
        if not new_head:
            raise InputError(f"model {model}: is no reward model, it lacks {', '.join(missing)}; train one first")
        print(f"model {model}: has no reward head, {', '.join(missing)} is new", file=sys.stderr)
    if pick_dtype(dtype).itemsize == 2:
        widen_head(reward, local_folder(where))
    reward.config.pad_token_id = tokenizer.pad_token_id
    reward = with_adapter(reward, adapter) if adapter else reward
    return (reward if device_map else reward.to(device())).eval(), tokenizer


def _labels(outputs: int) -> dict[str, Any]:
    return {"num_labels": outputs} if outputs else {}


def widen_head(reward: Any, folder: Path) -> None:
    """Grade in float32 whatever the type of the trunk: in 16 bits rewards a few thousandths apart are ties.

    Args:
        reward: a sequence classifier, which may be without weights.
        folder: with its files.
    """
    files = {} if value_heads.has_value_head(str(folder)) else {f.name: f for f in weights.weight_files(folder)}
    for name, child in reward.named_children():
        if child is reward.base_model or not list(child.parameters()):
            continue
        child.float()
        own = dict(child.named_parameters(prefix=name))
        for file in files.values():  # the digits that loading in 16 bits has dropped
            with safe_open(file, "pt") as stored:
                for key in own.keys() & set(stored.keys()):
                    own[key].data.copy_(stored.get_tensor(key))
        child.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))


def load_whole_policy(where: str, dtype: torch.dtype | str, **more: Any) -> Any:
    """A causal language model without a weight that its files lack; arguments as for :func:`load_as`."""
    policy, missing = load_as(AutoModelForCausalLM, where, dtype, **more)
    if missing:
        raise InputError(f"model {where}: is no whole language model, it lacks {', '.join(missing[:3])}")
    return policy


def load_as(auto: Any, where: str, dtype: torch.dtype | str, **more: Any) -> tuple[Any, list[str]]:
    """The model of a transformers class at ``where``, and the names of weights that were not there and so start at
    random; ``dtype`` "auto" is that of the files."""
    more |= {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with explained(where):
        model, info = auto.from_pretrained(_source(where), **more)
    for name, found, wanted in sorted(info["mismatched_keys"]):
        several = name.startswith("score.") and list(wanted)[:1] == [1]
        how = (
            ": choose an output of the scorer with `axis`, or save a copy with a head of one row "
            "(of two classes, row 1 less row 0 is the second's log-odds)"
        )
        shapes = f"{name} has shape {list(found)}, and {list(wanted)} is needed"
        raise InputError(f"model {where}: {shapes}{how if several else ''}")
    saving.repair_generation(model, where)
    return model, sorted(info["missing_keys"])


@contextlib.contextmanager
def explained(model: str) -> Iterator[None]:
    """Turn what transformers raises about a model that is not there, or cannot be loaded, into one sentence."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if Path(model).is_dir() or not _offline():
            reason = " ".join(str(error).split())[:300]
        else:
            reason = "there is no such folder, and the model hub cannot be reached and was not asked for it before"
        raise InputError(f"model {model}: cannot be loaded: {reason}") from error


def _source(where: str) -> str:
    """What to give transformers: a hub id only where the hub answers, for it asks a silent one for minutes."""
    return where if Path(where).is_dir() or not _offline() else str(local_folder(where))


@functools.cache
def _offline() -> bool:
    """Whether the model hub cannot be reached: asked once, and only when a hub id is to be loaded."""
    if constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the HTTP client of the day raises
        return True
    return False


def local_folder(model: str) -> Path:
    """The folder with a model's configuration, tokenizer and safetensors; those of a hub id are downloaded."""
    where = resolve(model)
    if Path(where).is_dir():
        return Path(where)
    with explained(model):
        wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # no pickles
        return Path(snapshot_download(where, allow_patterns=wanted, local_files_only=_offline()))


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all tokens that end a response: those of the generation config and the tokenizer's own."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    found = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    return {end for end in found if end is not None}


# --- adapters and tokens -----------------------------------------------------------------------------------------


def _is_adapter(folder: str) -> bool:
    return (Path(folder) / "adapter_config.json").is_file() and not (Path(folder) / "config.json").is_file()


def _base_of(adapter: str) -> str:
    """What the adapter names as its base; the cache of another machine stands for the same model in this one's."""
    path = Path(adapter) / "adapter_config.json"
    try:
        base = str(json.loads(path.read_text())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError):
        raise InputError(f"{path}: does not name its base model") from None
    made_here = (name for name, (folder, _) in _MADE_HERE.items() if folder == Path(base).name)
    return next(made_here, base)


def base_and_adapter(model: str, adapter: str) -> tuple[str, str]:
    """Where the weights lie, and the adapter to put on them: the one asked for, or the model itself if it is one."""
    where = resolve(model)
    if not _is_adapter(where):
        return where, adapter
    if adapter:
        raise InputError(f"model {model} is an adapter itself: it cannot take the adapter {adapter}")
    return resolve(_base_of(where)), where


def with_adapter(model: PreTrainedModel, adapter: str, is_trainable: bool = False) -> Any:
    """The adapter of a folder on its base, as a ``PeftModel``."""
    from peft import PeftModel

    if not (Path(adapter) / "adapter_config.json").is_file():
        raise InputError(f"adapter {adapter}: no folder with an adapter_config.json")
    with explained(adapter):
        return PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable)


def is_adapter(model: str) -> bool:
    """Whether a model's name leads to the folder of an adapter."""
    return _is_adapter(resolve(model))


def add_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> int:
    """Add special tokens to a tokenizer and rows to a model, each new row the mean of the old ones; return how many.

    Old rows keep their bits and tied embeddings stay tied. Rows that the matrix held in reserve behind the vocabulary
    are used first (and set to the mean: nobody trained them); the matrix never shrinks.
    """
    old = len(tokenizer)
    added = int(tokenizer.add_tokens(list(tokens), special_tokens=True))
    if not added:
        return 0
    untyped: Any = model
    if old + added > untyped.get_input_embeddings().num_embeddings:
        untyped.resize_token_embeddings(old + added, mean_resizing=False)  # its own way draws at random
    for layer in (untyped.get_input_embeddings(), untyped.get_output_embeddings()):
        for rows in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
            if rows is not None:
                rows.data[old : old + added] = rows.data[:old].double().mean(0).to(rows.dtype)  # bfloat16 sums stall
    return added


# --- fingerprints ------------------------------------------------------------------------------------------------


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits that change whenever some text could become other ids; chat template and padding do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        told = json.loads(backend.to_str())
        state: Any = {key: value for key, value in told.items() if key not in ("truncation", "padding")}
    else:
        state = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps([state, ends], sort_keys=True).encode()).hexdigest()[:16]


def weights_of(model: str) -> str:
    """What stands for the weights behind a model's name: their fingerprint, or the hub id itself."""
    where = resolve(model)
    return weights_fingerprint(where) if Path(where).is_dir() else where


def weights_fingerprint(model_or_folder: nn.Module | str | os.PathLike[str]) -> str:
    """64 hex digits over the names, types, shapes and bits of all weights, in whatever files or order they lie.

    A model in memory and the folder that it saves agree: tied weights count once.
    """
    if isinstance(model_or_folder, nn.Module):
        found: Mapping[str, weights.Bits] = weights.module_tensors(model_or_folder)
    else:
        found = {name: bits for file in weights.any_tensors(model_or_folder).values() for name, bits in file.items()}
    return weights.fingerprint({name: weights.line(bits) for name, bits in found.items()})

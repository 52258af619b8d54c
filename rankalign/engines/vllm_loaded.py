"""Models in vLLM: loaded once for all who name them, made room for, and with weights that follow a training."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from rankalign.errors import InputError
from rankalign.models import load as models

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM has room for; an adapter takes the next larger."""
CPU_CACHE_BYTES = 2 << 30
"""Room for keys and values on a CPU, where vLLM would take nine tenths of the machine; ``VLLM_CPU_KVCACHE_SPACE`` (GiB)
sets another."""
Written = tuple[list[int], bool, int | None]
"""Token ids of an answer, whether it ended by itself, and the token that ended it."""


class Loaded:
    """A model in vLLM, loaded on first use, freed with the last engine that holds it.

    One is in memory at a time, for each takes all there is: where another is used, this one makes room and loads anew.

    Args:
        model: ``default``, ``tiny``, a folder, a hub id, or the folder of a LoRA adapter.
        adapter: folder of a LoRA adapter to put on it, or empty.
        dtype: as in :func:`rankalign.models.load.pick_dtype`.
        more: arguments of ``vllm.LLM``.
        live: its weights are those that :meth:`take` was given last.
    """

    _all: ClassVar[weakref.WeakValueDictionary[tuple[str, ...], Loaded]] = weakref.WeakValueDictionary()

    def __init__(self, model: str, adapter: str, dtype: str, more: dict[str, Any], live: bool = False) -> None:
        self._model, self._adapter, self._dtype, self._more, self._live = model, adapter, dtype, more, live
        self._source: Any = None  # a live one's weights, and by what and as which they were given
        self._token: object = None
        self._version, self._taken, self._asleep = 0, 0, False
        self._held: list[Any] = []  # the model; who lets it go when this object is gone cannot ask this object for it
        weakref.finalize(self, _free, self._held)

    @classmethod
    def shared(cls, model: str, adapter: str, dtype: str, more: dict[str, Any], live: bool = False) -> Loaded:
        """The one for these arguments."""
        key = (model, adapter, dtype, json.dumps(more, sort_keys=True), "live" * live)
        found = cls._all.get(key)
        if found is None:
            found = cls._all[key] = cls(model, adapter, dtype, more, live)
        return found

    def take(self, model: Any, version: object) -> None:
        """Have the weights of a model under training from the next batch on: an adapter beside its base's, which stay
        where they are, or all of them in the place of the last ones.

        They go through a folder, as a checkpoint, so that families whose weights have other names on disk, other types
        and several GPUs need nothing of their own.

        Args:
            model: the model, whose weights must not change until they are no longer sampled with, or the folder of it.
            version: the same object for the same weights.
        """
        if version is not self._token:
            self._source, self._token, self._version = model, version, self._version + 1

    def rest(self) -> None:
        """Give memory on a GPU back until the next batch: all of it, or where an adapter trains, the cache, the weights
        waiting in the memory of the host."""
        if self._held and self._can_sleep and not self._asleep:
            adapted = self._adapted
            self._held[0].sleep(level=1 if adapted else 2)
            self._asleep, self._taken = True, self._taken if adapted else 0

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer: the model's limit, or less where vLLM's cache has no room for it."""
        limit: int = self._llm.llm_engine.model_config.max_model_len
        return limit

    def complete(self, prompts: Sequence[list[int]], params: Sequence[dict[str, Any]]) -> list[Written]:
        """Complete each prompt.

        Args:
            prompts: token ids.
            params: arguments of ``vllm.SamplingParams``, one mapping a prompt.

        Returns:
            For each prompt the new token ids, less one that ended them, whether they ended before the limit, and that
            one, if there was one.
        """
        from vllm import SamplingParams

        outputs = self._llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            [SamplingParams(**one) for one in params],
            lora_request=self._lora,
            use_tqdm=False,  # our own bar counts prompts
        )
        return [_read(output.outputs[0]) for output in outputs]

    @property
    def _adapted(self) -> bool:
        if isinstance(self._source, str):
            return (Path(self._source) / "adapter_config.json").is_file()
        return hasattr(self._source, "get_base_model")

    @property
    def _can_sleep(self) -> bool:
        return self._live and models.device().type == "cuda" and bool(self._more.get("enable_sleep_mode", True))

    @functools.cached_property
    def _parts(self) -> tuple[str, str]:
        base, adapter = models.base_and_adapter(self._model, self._adapter)
        return base, "" if self._live else adapter

    @property
    def _llm(self) -> Any:
        if not self._held:
            for other in list(Loaded._all.values()):
                _free(other._held)
            with _own_numbers():
                self._held.append(self._load())
            self._taken, self._asleep = 0, False
        llm = self._held[0]
        if self._asleep:
            llm.wake_up(tags=["weights"])
        if self._taken != self._version:
            self._refresh(llm)
        if self._asleep:
            llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        return llm

    def _written(self) -> str:
        """A new folder with the weights of the source, or its adapter, in the place of the last one; its own, where it
        is one."""
        if isinstance(self._source, str):
            return self._source
        self._files = tempfile.TemporaryDirectory(prefix="rankalign-weights-")
        self._source.save_pretrained(self._files.name)
        return self._files.name

    def _refresh(self, llm: Any) -> None:
        """Bring in the weights of the source.

        Raises:
            InputError: vLLM has no place for them.
        """
        folder = self._written()
        try:
            if self._adapted:
                from vllm.lora.request import LoRARequest

                if self._taken:
                    llm.llm_engine.remove_lora(self._taken)
                # A name and a number of its own, by which the cache of prompts tells it from the last one.
                self._lora = LoRARequest(f"adapter-{self._version}", self._version, folder)
                llm.llm_engine.add_lora(self._lora)
            else:
                llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
                llm.reset_prefix_cache()  # of prompts as other weights read them
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"vllm cannot take in the weights that train: {_brief(error)}") from error
        self._taken = self._version

    def _load(self) -> Any:
        from vllm import LLM

        base, adapter = self._parts
        where = str(models.local_folder(base))
        sleeps = {"enable_sleep_mode": True} if self._can_sleep else {}
        try:
            llm = LLM(where, **{**self._settings(), **_device_settings(), **sleeps, **self._more})
            if self._lora and not self._live:
                llm.llm_engine.add_lora(self._lora)
        except (OSError, ValueError, RuntimeError) as error:
            what = f"model {where}" + (f" with adapter {adapter}" if adapter else "")
            raise InputError(f"{what}: vllm cannot load it: {_brief(error)}") from error
        return llm

    def _settings(self) -> dict[str, Any]:
        """A context that does not fit beside the weights is cut to what does; prompts are checked against that."""
        return {
            "dtype": str(models.pick_dtype(self._dtype)).removeprefix("torch."),
            "enable_prefix_caching": True,
            "max_model_len": -1,
            "use_tqdm_on_load": False,
            **_lora_settings(self._written() if self._live and self._adapted else self._parts[1]),
        }

    @functools.cached_property
    def _lora(self) -> Any:
        from vllm.lora.request import LoRARequest

        adapter = self._parts[1]
        return LoRARequest("adapter", 1, adapter) if adapter else None


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@contextlib.contextmanager
def _own_numbers() -> Iterator[None]:
    """Leave the random numbers of this process as they are: vLLM seeds all of them when it loads."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def _lora_settings(adapter: str) -> dict[str, Any]:
    """Room for an adapter; none where there is none."""
    if not adapter:
        return {}
    path = Path(adapter) / "adapter_config.json"
    if not path.is_file():
        raise InputError(f"adapter {adapter}: no folder with an adapter_config.json")
    config = json.loads(path.read_text())
    rank = max(config.get("r", 1), *config.get("rank_pattern", {}).values(), 1)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": next((most for most in RANKS if most >= rank), rank)}


def _read(output: Any) -> Written:
    """``stop_reason`` is a string where a stop string ended the answer, and no token."""
    ids, ended = list(output.token_ids), output.finish_reason == "stop"
    return (ids[:-1], True, ids[-1]) if ended and not isinstance(output.stop_reason, str) else (ids, ended, None)


def _device_settings() -> dict[str, Any]:
    """On a CPU: no compilation (minutes of it for a twentieth of the time), and a cache of a fixed size."""
    if models.device().type != "cpu":
        return {}
    return {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}


def _free(held: list[Any]) -> None:
    """Let a model go, if there is one: vLLM's objects refer to each other and are kept from the garbage collector, and
    its process group stays until it is ended."""
    if held:
        from vllm.distributed import cleanup_dist_env_and_memory

        held.pop().llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()

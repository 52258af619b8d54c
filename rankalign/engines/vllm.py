"""Answers by vLLM in this process (Kwon et al. 2023): continuous batching, and prompts shared through its cache."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from rankalign.data.records import CandidateSet, Response
from rankalign.engines import Policy
from rankalign.engines.local import LocalEngine
from rankalign.engines.seeds import request_seed
from rankalign.errors import InputError, missing_extra
from rankalign.models import load as models
from rankalign.registry import did_you_mean

MAX_REQUESTS = 256
"""Answers asked for at once: as many as vLLM keeps in flight. More would save the idle end of each batch, but progress
is shown, and an interrupted run resumes, by the batch."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM has room for; an adapter takes the next larger."""
CPU_CACHE_BYTES = 2 << 30
"""Room for keys and values on a CPU, where vLLM would take nine tenths of the machine; ``VLLM_CPU_KVCACHE_SPACE`` (GiB)
sets another."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # requests that come from another process meet in other batches every time
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""What vLLM reads on import; variables that are set already stay."""


TAKEN = {
    "model": "the policy's model",
    "tokenizer": "the model's own",
    "dtype": "the policy's dtype",
    "seed": "the sampling's, one a request",
    "enable_lora": "the policy's adapter",
    "max_loras": "the policy's adapter",
    "max_lora_rank": "the policy's adapter",
    "enable_prefix_caching": "on: the answers to a prompt share it",
    "trust_remote_code": "off: no code of a model runs here",
}
"""Arguments of vLLM that other settings decide."""

Written = tuple[list[int], bool, int | None]
"""Token ids of an answer, whether it ended by itself, and the token that ended it."""


class VLLMEngine(LocalEngine):
    """Writes answers with ``vllm.LLM``, one request an answer.

    Each of the ``n`` answers to a prompt is a request of its own with its own seed, a pure function of base seed,
    prompt id, policy name and index; the prefix cache computes their prompt once. At temperature 0 one request serves
    for all ``n``. vLLM draws its own numbers: answers are others than those of engine ``hf``, of the same distribution;
    greedy answers are the same but for rounding. Rounding may also turn a draw when other requests are in flight,
    as in engine ``hf``; the same list of prompts gives the same bytes.

    Policies of one run that name the same model, adapter, dtype and arguments of vLLM share its weights.

    Args:
        policy: model, adapter, template and sampling settings.

    Raises:
        InputError: vLLM is not installed, or settings that it cannot follow.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        _check(policy)
        _require_vllm()
        self._loaded = Loaded.shared(policy.model, policy.adapter, policy.dtype, _arguments(policy))

    def batches(self, prompts: Sequence[CandidateSet]) -> list[list[int]]:
        """Indices by falling prompt length, MAX_REQUESTS answers a batch (one prompt at least).

        The longest come first: what does not fit in the model's context fails before any work is done.
        """
        lengths = self._lengths(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -lengths[i])
        size = max(1, MAX_REQUESTS // self._copies)
        return [order[i : i + size] for i in range(0, len(order), size)]

    def generate(self, prompts: Sequence[CandidateSet]) -> list[list[Response]]:
        """Answer one batch.

        Raises:
            InputError: vLLM cannot load the model or adapter, or a prompt leaves no room for ``max_new_tokens`` in the
                model's context.
        """
        ids = [self._encode(prompt) for prompt in prompts]
        self._check_context(prompts, ids, self._loaded.context)
        copies = self._copies
        answers = self._loaded.complete(
            [tokens for tokens in ids for _ in range(copies)],
            [self._request(prompt, index) for prompt in prompts for index in range(copies)],
        )
        written = [
            [
                self._response(ids, ended, index, end)
                for index in range(self.policy.sampling.n)
                for ids, ended, end in [answers[row * copies + index % copies]]
            ]
            for row in range(len(prompts))
        ]
        return self._with_calls(prompts, written)

    def _request(self, prompt: CandidateSet, index: int) -> dict[str, Any]:
        """One answer's sampling settings, as vLLM names them."""
        params = self.policy.sampling
        return {
            "seed": request_seed(params.seed, prompt.id, self.policy.name, index),
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "stop": list(self._stop),
            "stop_token_ids": sorted(self._turn_end),
        }


class Loaded:
    """A model in vLLM, loaded on first use, freed with the last engine that holds it.

    One is in memory at a time, for each takes all there is: where another is used, this one makes room and loads anew.

    Args:
        model: ``default``, ``tiny``, a folder, a hub id, or the folder of a LoRA adapter.
        adapter: folder of a LoRA adapter to put on it, or empty.
        dtype: as in :func:`rankalign.models.load.pick_dtype`.
        more: arguments of ``vllm.LLM``.
    """

    _all: ClassVar[weakref.WeakValueDictionary[tuple[str, ...], Loaded]] = weakref.WeakValueDictionary()

    def __init__(self, model: str, adapter: str, dtype: str, more: dict[str, Any]) -> None:
        self._model, self._adapter, self._dtype, self._more = model, adapter, dtype, more
        self._held: list[Any] = []  # the model; who lets it go when this object is gone cannot ask this object for it
        weakref.finalize(self, _free, self._held)

    @classmethod
    def shared(cls, model: str, adapter: str, dtype: str, more: dict[str, Any]) -> Loaded:
        """The one for these arguments."""
        key = (model, adapter, dtype, json.dumps(more, sort_keys=True))
        found = cls._all.get(key)
        if found is None:
            found = cls._all[key] = cls(model, adapter, dtype, more)
        return found

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

    @functools.cached_property
    def _parts(self) -> tuple[str, str]:
        return models.base_and_adapter(self._model, self._adapter)

    @property
    def _llm(self) -> Any:
        if not self._held:
            for other in list(Loaded._all.values()):
                _free(other._held)
            self._held.append(self._load())
        return self._held[0]

    def _load(self) -> Any:
        from vllm import LLM

        base, adapter = self._parts
        where = str(models.local_folder(base))
        try:
            llm = LLM(where, **{**self._settings(), **_device_settings(), **self._more})
            if self._lora:
                llm.llm_engine.add_lora(self._lora)
        except (OSError, ValueError, RuntimeError) as error:
            what = f"model {where}" + (f" with adapter {adapter}" if adapter else "")
            raise InputError(f"{what}: vllm cannot load it: {' '.join(str(error).split())[:300]}") from error
        return llm

    def _settings(self) -> dict[str, Any]:
        """A context that does not fit beside the weights is cut to what does; prompts are checked against that."""
        return {
            "dtype": str(models.pick_dtype(self._dtype)).removeprefix("torch."),
            "enable_prefix_caching": True,
            "max_model_len": -1,
            "use_tqdm_on_load": False,
            **_lora_settings(self._parts[1]),
        }

    @functools.cached_property
    def _lora(self) -> Any:
        from vllm.lora.request import LoRARequest

        adapter = self._parts[1]
        return LoRARequest("adapter", 1, adapter) if adapter else None


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


def _require_vllm() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm.version  # noqa: F401
    except ImportError as error:
        raise missing_extra("engine 'vllm'", "vllm") from error


def _arguments(policy: Policy) -> dict[str, Any]:
    """What the policy says to ``vllm.LLM``.

    Raises:
        InputError: an argument that vLLM does not have, or that says again what another setting says.
    """
    own = {
        "tensor_parallel_size": policy.tensor_parallel_size if policy.tensor_parallel_size > 1 else None,
        "gpu_memory_utilization": policy.gpu_memory_utilization or None,
        "max_model_len": policy.max_model_len or None,
        "quantization": policy.quantization or None,
        "kv_cache_dtype": policy.kv_cache_dtype or None,
    }
    from vllm.engine.arg_utils import EngineArgs

    known = {item.name for item in dataclasses.fields(EngineArgs)} - TAKEN.keys() - own.keys()
    for name in policy.engine_args:
        if name in TAKEN or name in own:
            why = TAKEN.get(name, "a setting of its own")
            raise InputError(f"policy {policy.name!r}: engine_args: {name} is {why}")
        if name not in known:
            raise InputError(f"policy {policy.name!r}: engine_args: vllm has no {name!r}{did_you_mean(name, known)}")
    return {**{name: value for name, value in own.items() if value is not None}, **policy.engine_args}


def _check(policy: Policy) -> None:
    """Refuse settings that vLLM cannot follow, rather than leave them out in silence."""
    params = policy.sampling
    problems = {
        "engine 'vllm' searches no beams; use engine hf": params.num_beams > 1,
        "engine 'vllm' keeps no logprobs; serve the model (vllm serve) and use engine openai": params.logprobs > 0,
        "engine 'vllm' takes temperatures below 0.01 for 0.01; use 0, which is greedy": 0 < params.temperature < 0.01,
    }
    for problem, true in problems.items():
        if true:
            raise InputError(f"policy {policy.name!r}: {problem}")

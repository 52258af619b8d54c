"""Answers by vLLM in this process (Kwon et al. 2023): continuous batching, and prompts shared through its cache."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from rankalign.data.records import CandidateSet, Response
from rankalign.engines import Policy
from rankalign.engines.local import LocalEngine
from rankalign.engines.seeds import request_seed
from rankalign.engines.vllm_loaded import Loaded, Written
from rankalign.errors import InputError, missing_extra
from rankalign.registry import did_you_mean

MAX_REQUESTS = 256
"""Answers asked for at once: as many as vLLM keeps in flight. More would save the idle end of each batch, but progress
is shown, and an interrupted run resumes, by the batch."""
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

    def take(self, model: Any, tokenizer: Any, start: str, version: object) -> None:
        """Sample with the weights that a model in memory has now; see :meth:`Loaded.take`.

        Args:
            model: under training, bare or inside PEFT; or the folder of it.
            tokenizer: its tokenizer.
            start: the name of the model that it was before any training.
            version: the same object for the same weights.
        """
        self.tokenizer = tokenizer
        self._loaded = Loaded.shared(start, "", self.policy.dtype, _arguments(self.policy), live=True)
        self._loaded.take(model, version)

    def rest(self) -> None:
        """Give memory on a GPU back until the next batch; see :meth:`Loaded.rest`."""
        self._loaded.rest()

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
        keys = [(prompt.id, index) for prompt in prompts for index in range(copies)]
        answers = self.complete([tokens for tokens in ids for _ in range(copies)], keys)
        written = [
            [
                self._response(ids, ended, index, end)
                for index in range(self.policy.sampling.n)
                for ids, ended, end in [answers[row * copies + index % copies]]
            ]
            for row in range(len(prompts))
        ]
        return self._with_calls(prompts, written)

    def complete(self, prompts: Sequence[list[int]], keys: Sequence[tuple[str, int]]) -> list[Written]:
        """One answer to each prompt, see :meth:`Loaded.complete`.

        Args:
            prompts: token ids.
            keys: prompt id and number of the answer, from which its seed comes.
        """
        return self._loaded.complete(prompts, [self._request(*key) for key in keys])

    def _request(self, ident: str, index: int) -> dict[str, Any]:
        """One answer's sampling settings, as vLLM names them."""
        params = self.policy.sampling
        return {
            "seed": request_seed(params.seed, ident, self.policy.name, index),
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "stop": list(self._stop),
            "stop_token_ids": sorted(self._turn_end),
        }


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

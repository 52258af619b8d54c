"""Engines write responses. One file each; add one by a file and a line in :data:`ENGINES`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field
from typing import Any, Protocol

from rankalign.data.records import CandidateSet, Response
from rankalign.errors import InputError
from rankalign.registry import Entry, Registry

MOST_LOGPROBS = 20
"""As many as OpenAI's interface gives."""
DECODINGS = ("auto", "dynamic", "static", "graph")
"""How engine ``hf`` keeps memory while it writes, see :attr:`Policy.decoding`."""


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn.

    Attributes:
        n: responses a prompt.
        max_new_tokens: limit in tokens; an answer that reaches it is not ``finished``.
        temperature: logits are divided by it; 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches this.
        min_p: drop tokens less likely than this times the likeliest.
        stop: strings that end an answer and are cut off with everything behind them.
        seed: base seed; every (prompt id, policy, index) derives its own from it.
        num_beams: above 1, beam search in place of sampling: the ``n`` best of so many beams.
        num_beam_groups: above 1, diverse beam search: so many groups of ``num_beams / num_beam_groups`` beams; the
            answers are the best of each group in turn, group 1 first.
        diversity_penalty: taken off a token's log-probability for every earlier group that chose it at the same step.
        length_penalty: beams are ranked by log-probability / length ** length_penalty.
        logprobs: with each token of an answer keep the log-probabilities of so many likeliest ones, as the model gives
            them before temperature and filters (``hf``, ``openai``): ``meta["logprobs"]``, a list with one
            ``{"token": text, "top": {text: log-probability}}`` a token; 0 keeps none.

    Raises:
        InputError: a value out of range, or two that contradict each other.
    """

    n: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    logprobs: int = 0

    def __post_init__(self) -> None:
        for problem, broken in self._problems().items():
            if broken:
                raise InputError(f"sampling: {problem}")

    def _problems(self) -> dict[str, bool]:
        # `not x >= 0` and not `x < 0`: NaN is refused, too.
        counts = (self.n, self.max_new_tokens, self.num_beams, self.num_beam_groups)
        filtered = (self.top_k, self.top_p, self.min_p) != (0, 1, 0) or self.temperature not in (0, 1)
        beams = self.num_beams > 1
        return {
            "n, max_new_tokens, num_beams and num_beam_groups must be at least 1": min(counts) < 1,
            "temperature must not be negative": not self.temperature >= 0,
            "top_k must not be negative": self.top_k < 0,
            "top_p must lie above 0 and not above 1": not 0 < self.top_p <= 1,
            "min_p must lie between 0 and 1": not 0 <= self.min_p <= 1,
            "a stop string must not be empty": "" in self.stop,
            "num_beams must be a multiple of num_beam_groups": self.num_beams % max(self.num_beam_groups, 1) != 0,
            "n must not exceed num_beams": beams and self.n > self.num_beams,
            "beams are searched, not drawn: leave temperature, top_k, top_p and min_p out": beams and filtered,
            "diversity_penalty must not be negative": not self.diversity_penalty >= 0,
            "diversity_penalty needs num_beam_groups": self.diversity_penalty > 0 and self.num_beam_groups == 1,
            "logprobs must lie between 0 and 20": not 0 <= self.logprobs <= MOST_LOGPROBS,
            "logprobs are of drawn tokens: leave num_beams out": beams and self.logprobs > 0,
        }


@dataclass(frozen=True)
class Policy:
    """Who answers: an engine with a model, a template and sampling settings.

    Attributes:
        name: stands in every response it writes.
        engine: a name in :data:`ENGINES`.
        model: ``default``, ``tiny``, a folder or a hub id; unused by ``replay``.
        adapter: folder of a LoRA adapter to put on the model, or empty.
        template: a name in ``rankalign.data.templates`` (``auto``: the model's own if it has one, else ``raw``).
        system: system message put before the prompt, or empty.
        allow_special_in_text: control tokens that prompts spell are control tokens, not text (``hf``, ``vllm``).
        file: ``replay`` only: records whose responses are taken; empty takes those of the prompt file.
        only: ``replay`` only: take responses of this policy; empty takes all.
        dtype: weights' type (``auto``, ``float32``, ``bfloat16``, ``float16``).
        base_url: ``openai`` only: the server, such as ``http://127.0.0.1:8000/v1``.
        api_key_env: ``openai`` only: name of the environment variable that holds the key; empty sends none.
        concurrency: ``openai`` only: most requests in flight.
        prompt_price: ``openai`` only: of a million prompt tokens, for the bill at the end.
        completion_price: ``openai`` only: of a million completion tokens.
        extra_body: ``openai`` only: more fields of every request, as the server names them.
        start_share: ``hf`` in `rankalign iterate` only: draw from the geometric mixture
            ``policy^(1 - share) * start^share`` of the weights of the moment and the start model; 1 is the start model.
        device_map: ``hf`` only: how a model that one GPU does not hold is laid over several, a name in
            :data:`rankalign.models.load.DEVICE_MAPS`; empty puts it on one.
        decoding: ``hf`` only: how memory is kept while answers are written, a name in :data:`DECODINGS`. ``graph``
            replays the steps on a GPU as a CUDA graph, in memory of fixed size; ``static`` is the same memory without a
            graph, on any device; ``dynamic`` grows with the answers; ``auto`` is ``graph`` on a GPU where the model can
            be replayed and answers may be long, else ``dynamic``.
        tensor_parallel_size: ``vllm`` only: GPUs that share each layer.
        gpu_memory_utilization: ``vllm`` only: share of a GPU's memory for weights and cache; 0 is vLLM's own (0.9).
        max_model_len: ``vllm`` only: most tokens of prompt and answer; 0 is what the model and the cache have room for.
        quantization: ``vllm`` only: how weights are held, as vLLM names it (``fp8``, ``awq``, ``bitsandbytes``).
        kv_cache_dtype: ``vllm`` only: type of the cache (``auto``, ``fp8``).
        engine_args: ``vllm`` only: any other argument of ``vllm.LLM``, as vLLM names it.
        sampling: how it draws.

    Raises:
        InputError: a value out of range, or a field of one engine with another.
    """

    name: str
    engine: str = "hf"
    model: str = "default"
    adapter: str = ""
    template: str = "auto"
    system: str = ""
    allow_special_in_text: bool = False
    file: str = ""
    only: str = ""
    dtype: str = "auto"
    base_url: str = ""
    api_key_env: str = ""
    concurrency: int = 8
    prompt_price: float = 0.0
    completion_price: float = 0.0
    extra_body: dict[str, Any] = field(default_factory=dict)
    start_share: float = 0.0
    device_map: str = ""
    decoding: str = "auto"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.0
    max_model_len: int = 0
    quantization: str = ""
    kv_cache_dtype: str = ""
    engine_args: dict[str, Any] = field(default_factory=dict)
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        for engine, names in OF_ENGINE.items():
            # An engine of the user's own may read any of them.
            for name in names if engine != self.engine and ":" not in self.engine else ():
                if getattr(self, name) != _default(name):
                    raise InputError(f"policy {self.name!r}: {name} is a setting of engine {engine!r}")
        problems = {
            "tensor_parallel_size must be at least 1": self.tensor_parallel_size < 1,
            "gpu_memory_utilization must lie between 0 and 1": not 0 <= self.gpu_memory_utilization <= 1,
            "max_model_len must not be negative": self.max_model_len < 0,
            "start_share must lie between 0 and 1": not 0 <= self.start_share <= 1,
            f"decoding must be one of {', '.join(DECODINGS)}": self.decoding not in DECODINGS,
        }
        for problem, broken in problems.items():
            if broken:
                raise InputError(f"policy {self.name!r}: {problem}")


OF_ENGINE = {
    "hf": ("device_map", "decoding", "start_share"),
    "vllm": (
        "tensor_parallel_size",
        "gpu_memory_utilization",
        "max_model_len",
        "quantization",
        "kv_cache_dtype",
        "engine_args",
    ),
}
"""Fields of a policy that say how one engine holds its model."""
ABOUT_THE_CALL = (
    "api_key_env",
    "concurrency",
    "prompt_price",
    "completion_price",
    "device_map",
    "gpu_memory_utilization",
    "max_model_len",
)
"""Fields of a policy that no answer depends on: they may change when a run is resumed."""


def _default(name: str) -> Any:
    item = Policy.__dataclass_fields__[name]
    made: Any = item.default_factory
    return item.default if item.default is not MISSING else made()


def identity(policy: Policy) -> dict[str, Any]:
    """The fields that a policy's answers depend on. What was not there in 0.1 counts only where it is set, so that
    outputs of before stay finished."""
    young = {name for names in OF_ENGINE.values() for name in names}
    told = {key: value for key, value in asdict(policy).items() if key not in ABOUT_THE_CALL}
    told["sampling"] = {key: value for key, value in told["sampling"].items() if key != "logprobs" or value}
    return {key: value for key, value in told.items() if key not in young or value != _default(key)}


class Engine(Protocol):
    """Writes ``policy.sampling.n`` responses to each prompt (``replay``: as many as the data hold).

    Constructed as ``Engine(policy)``; anything heavy is loaded on the first ``generate``.
    """

    def batches(self, prompts: Sequence[CandidateSet]) -> list[list[int]]:
        """Group all prompts of a run into batches of indices. Depends on the whole list only, never on what is done:
        a resumed run recomputes the very same batches and so the very same bytes."""
        ...

    def generate(self, prompts: Sequence[CandidateSet]) -> list[list[Response]]:
        """Answer one batch; outer order is that of ``prompts``, and each answer depends on its own seed only."""
        ...


ENGINES = Registry(
    "engine",
    {
        "hf": Entry("rankalign.engines.hf:HFEngine", "transformers in this process, prompts prefilled once for all n"),
        "openai": Entry(
            "rankalign.engines.openai:OpenAIEngine", "any OpenAI-compatible server, by the official client", "judge"
        ),
        "replay": Entry("rankalign.engines.replay:ReplayEngine", "answers that are already in the data"),
        "vllm": Entry("rankalign.engines.vllm:VLLMEngine", "vLLM in this process: fastest on a GPU", "vllm"),
    },
)

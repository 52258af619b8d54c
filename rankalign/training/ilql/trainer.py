"""ILQL: learning offline from texts with returns, then steering the policy by what each token is worth.

One pass over given texts, no sampling and no reference: heads on the policy learn Q(s, a) and V(s) of its tokens, and
the policy itself is fitted to the texts. Answers are sampled with beta (Q - V) added to the policy's logits.
"""

from __future__ import annotations

import copy
import hashlib
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase, set_seed

from rankalign.data.encode import EncodeOptions, TokenList, encode_all, said
from rankalign.data.records import LARGEST_SCORE, CandidateSet, Prompt, Response
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models import saving
from rankalign.models.caches import cache_name
from rankalign.models.identity import config_of, tokenizer_hash
from rankalign.progress import Progress
from rankalign.registry import did_you_mean
from rankalign.rows.head import head_of, label_logps
from rankalign.rows.logps import causal_lm
from rankalign.storage import manifest, outputs
from rankalign.storage.files import write_text
from rankalign.storage.folders import check_writable
from rankalign.storage.jsonl import dumps, without_nan
from rankalign.training.fit import check_end, check_fit
from rankalign.training.ilql import math as ilql_math
from rankalign.training.inputs import disable_dropout, say_counts
from rankalign.training.ppo.value import ValueHead, predicting_states

HEADS_FILE = "ilql_heads.safetensors"
RETURN = "return"
Sample = str | Sequence[Prompt | str]


@dataclass(frozen=True)
class ILQLSettings:
    """What a run depends on; the defaults of the last eight are trlX's.

    ``alpha`` is that of trlX's run of 1,000 updates: with ``sync_steps`` 5, targets go half of the way to their heads
    in 33 updates. The 0.001 of its general settings takes 3,500 and suits runs of tens of thousands.

    Attributes:
        model: start model.
        output_dir: where model, heads, ``log.jsonl`` and the manifest go.
        template: prompt format, see :func:`rankalign.data.encode.encode_prompt`.
        allow_special_in_text: control tokens that texts spell are control tokens, not text.
        max_length: most tokens of prompt and answer together.
        num_train_epochs: passes over the samples.
        max_steps: updates; above 0 it overrules ``num_train_epochs``.
        per_device_train_batch_size: samples a micro-batch; each token holds four rows of the vocabulary's size.
        gradient_accumulation_steps: micro-batches an update.
        max_grad_norm: gradients are cut to this norm.
        seed: of heads and order.
        overwrite: start over where ``output_dir`` holds a run.
        learning_rate: constant.
        tau: expectile of V.
        gamma: discount.
        cql_scale: weight of the conservative term.
        awac_scale: weight of the likelihood term.
        awac_beta: how much likelihood follows the advantage; 0 weighs all tokens alike.
        alpha: share by which target heads move.
        sync_steps: updates between such moves.
    """

    model: str = "default"
    output_dir: str = "runs/ilql"
    template: str = "raw"
    allow_special_in_text: bool = False
    max_length: int = 512
    num_train_epochs: int = 1
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    seed: int = 42
    overwrite: bool = False
    learning_rate: float = 5e-5
    tau: float = 0.7
    gamma: float = 0.99
    cql_scale: float = 0.1
    awac_scale: float = 1.0
    awac_beta: float = 0.0
    alpha: float = 0.1
    sync_steps: int = 5

    def __post_init__(self) -> None:
        for name in ("tau", "gamma", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a share from 0 to 1, not {getattr(self, name)}")
        counts = ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "sync_steps")
        for name in counts:
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1")


def settings_of(content: Mapping[str, Any]) -> ILQLSettings:
    """Settings from a mapping.

    Raises:
        InputError: an unknown name, or a value that makes no sense.
    """
    known = [item.name for item in fields(ILQLSettings)]
    for name in content:
        if name not in known:
            raise InputError(f"ILQL has no setting {name!r}{did_you_mean(name, known)}")
    return ILQLSettings(**content)


class ILQLModel(nn.Module):
    """A policy with a value head, two Q heads and their slow copies.

    Args:
        policy: a causal language model.
        layout: of rows, see :func:`rankalign.rows.logps.list_logps`.
    """

    def __init__(self, policy: nn.Module, layout: str = "auto") -> None:
        super().__init__()
        lm = causal_lm(policy)
        width, vocabulary = lm.config.get_text_config().hidden_size, len(head_of(lm).weight)
        self.policy, self.layout = policy, layout
        self.value_head = ValueHead(width).to(lm.device)
        self.q_heads = nn.ModuleList(_q_head(width, vocabulary) for _ in range(2)).to(lm.device)
        self.target_heads = copy.deepcopy(self.q_heads).requires_grad_(False)

    def losses(self, lists: Sequence[TokenList], rewards: Tensor, settings: ILQLSettings) -> dict[str, Tensor]:
        """``q_loss``, ``value_loss``, ``cql_loss``, ``awac_loss`` and their weighted sum ``loss``, means over tokens.

        Args:
            lists: samples, one answer each.
            rewards: (samples,), given for the last token of each answer.
            settings: weights of the terms.
        """
        answers = [tokens.responses[0] for tokens in lists]
        states, actions = predicting_states(self.policy, [t.prompt for t in lists], answers, self.layout)
        lengths = torch.tensor([len(answer) for answer in answers], device=states.device)
        ends = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        ends[lengths.cumsum(0) - 1] = True
        hidden = states.float()
        qs = [head(hidden) for head in self.q_heads]
        with torch.no_grad():
            target = ilql_math.taken(ilql_math.least([head(hidden) for head in self.target_heads]), actions)
        values = self.value_head(hidden)
        gains = ilql_math.rewards_at_ends(rewards.to(values), ends)
        following = ilql_math.next_values(values, ends)
        logps = label_logps(head_of(causal_lm(self.policy)), states, actions)
        terms = {
            "q_loss": (1.0, ilql_math.q_loss(qs, actions, gains, following, settings.gamma)),
            "value_loss": (1.0, ilql_math.expectile_loss(values, target, settings.tau)),
            "cql_loss": (settings.cql_scale, ilql_math.cql_loss(qs, actions)),
            "awac_loss": (settings.awac_scale, ilql_math.awac_loss(logps, target - values, settings.awac_beta)),
        }
        total = torch.stack([weight * term for weight, term in terms.values()]).sum()
        return {"loss": total, **{name: term for name, (_, term) in terms.items()}}

    def sync(self, alpha: float) -> None:
        """Move the slow copies towards the Q heads."""
        ilql_math.polyak(self.target_heads.parameters(), self.q_heads.parameters(), alpha)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        ends: Collection[int],
        max_new_tokens: int = 56,
        beta: float = 1.0,
        top_k: int = 20,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """An answer to each prompt, sampled from the steered policy, its end token included.

        Args:
            prompts: token ids, at least one each.
            ends: ids that end an answer.
            max_new_tokens: most tokens of an answer.
            beta: how much the advantage counts; 0 samples from the policy alone.
            top_k: only so many tokens are drawn from; 0 draws from all.
            temperature: 0 takes the best token.
            seed: of the draws.
        """
        generator = torch.Generator().manual_seed(seed)
        return [
            self._answer(list(prompt), ends, max_new_tokens, (beta, top_k, temperature), generator)
            for prompt in prompts
        ]

    def _answer(
        self,
        prompt: list[int],
        ends: Collection[int],
        limit: int,
        how: tuple[float, int, float],
        generator: torch.Generator,
    ) -> list[int]:
        lm, written = causal_lm(self.policy), list[int]()
        memory = {cache_name(lm) or "past_key_values": DynamicCache(config=lm.config)}
        beta, top_k, temperature = how
        while len(written) < limit and not (written and written[-1] in ends):
            ids = torch.tensor([written[-1:] or prompt], device=lm.device)
            out = lm(input_ids=ids, use_cache=True, output_hidden_states=True, **memory)
            hidden = out.hidden_states[-1][:, -1].float()
            q = ilql_math.least([head(hidden) for head in self.target_heads])
            scores = ilql_math.steered_logits(out.logits[:, -1].float(), q, self.value_head(hidden), beta, top_k)[0]
            if temperature == 0:
                written.append(int(scores.argmax()))
            else:
                chances = (scores / temperature).softmax(0).cpu()
                written.append(int(torch.multinomial(chances, 1, generator=generator)))
        return written

    def save(self, folder: Path) -> None:
        """The policy as plain transformers weights, and all heads beside it."""
        policy: Any = self.policy
        policy.save_pretrained(str(folder))
        save_file(self._heads(), folder / HEADS_FILE)

    def _heads(self) -> dict[str, Tensor]:
        return {name: t.contiguous() for name, t in self.state_dict().items() if not name.startswith("policy.")}


def _q_head(width: int, vocabulary: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, vocabulary))


def load_ilql(folder: str) -> ILQLModel:
    """What :func:`train_ilql` saved, ready to generate.

    Raises:
        InputError: the folder holds no heads.
    """
    path = Path(folder) / HEADS_FILE
    if not path.is_file():
        raise InputError(f"{folder}: holds no {HEADS_FILE}, so nothing was trained there by ILQL")
    model = ILQLModel(models.load_policy(folder, dtype="float32"))
    heads = load_file(path, device=str(models.device()))
    model.load_state_dict({**{f"policy.{k}": v for k, v in model.policy.state_dict().items()}, **heads})
    return model.eval()


# --- the run -----------------------------------------------------------------------------------------------------


def train_ilql(samples: Sequence[Sample], returns: Sequence[float], settings: ILQLSettings) -> dict[str, Any]:
    """Train on texts and their returns and leave model, heads, ``log.jsonl`` and manifest in ``output_dir``.

    Runs in one process and from start to end: an interrupted run begins again.

    Args:
        samples: texts, or pairs of a prompt and the answer to it.
        returns: one finite number a sample; they are standardised.
        settings: see :class:`ILQLSettings`.

    Returns:
        ``{"output", "steps", "counts", "metrics", "seconds", "already_finished"}``.

    Raises:
        InputError: samples and returns do not fit, or bad settings.
    """
    records = records_of(samples, returns)
    output, started = Path(settings.output_dir), time.time()
    outputs.begin(output, {"model": settings.model}, settings.overwrite)
    told = _told(settings, samples, returns)
    if manifest.is_finished(output, told):
        print(f"{output} is finished already with these settings: nothing to do", file=sys.stderr)
        return _summary(output, True)
    check_writable(output)
    set_seed(settings.seed)
    tokenizer = models.load_tokenizer(settings.model)
    check_end(tokenizer)
    lists, counts = _encode(records, tokenizer, settings)
    policy: Any = models.load_policy(settings.model, dtype="float32")
    check_fit(policy, lists)
    disable_dropout(policy)
    model = ILQLModel(policy).train()
    history = _fit(model, lists, settings)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "log.jsonl", "".join(dumps(without_nan(line)) + "\n" for line in history))
    model.save(output)
    tokenizer.save_pretrained(str(output))
    saving.finish(output, models.local_folder(settings.model))
    made = [path for path in sorted(output.iterdir()) if path.is_file() and path.name != "manifest.json"]
    facts = {"steps": len(history), "counts": counts, "metrics": history[-1], "seconds": time.time() - started}
    manifest.write(output, "train", told, [], made, **facts)
    return _summary(output, False)


def records_of(samples: Sequence[Sample], returns: Sequence[float]) -> list[CandidateSet]:
    """Samples with their returns as records of one response.

    Raises:
        InputError: other numbers of them, or a sample that is neither a text nor a prompt with its answer.
    """
    if len(samples) != len(returns) or not len(samples):
        raise InputError(f"{len(samples)} samples but {len(returns)} rewards: one reward a sample is needed")
    numbers = torch.tensor([float(value) for value in returns], dtype=torch.float64)
    usable = numbers.abs() <= LARGEST_SCORE  # NaN is not
    if not usable.all():
        at = int((~usable).nonzero()[0])
        raise InputError(
            f"the reward of sample {at} is {float(numbers[at]):g}: not finite, or beyond {LARGEST_SCORE:g}"
        )
    scores = ilql_math.standardised(numbers).tolist()
    found = []
    for i, (sample, score) in enumerate(zip(samples, scores, strict=True)):
        parts: Sequence[Any] = ["", sample] if isinstance(sample, str) else list(sample)
        if len(parts) != 2 or not isinstance(parts[1], str):
            raise InputError(f"sample {i}: give a text, or a prompt and the answer to it; several turns as a chat")
        found.append(CandidateSet(f"sample-{i}", parts[0], [Response(parts[1], scores={RETURN: score})]))
    return found


def _told(settings: ILQLSettings, samples: Sequence[Sample], returns: Sequence[float]) -> dict[str, Any]:
    """All that the result depends on."""
    own = {name: value for name, value in asdict(settings).items() if name not in ("output_dir", "overwrite")}
    data = hashlib.sha256(dumps([list(samples), [float(value) for value in returns]]).encode()).hexdigest()
    hashes = {"model_sha256": models.weights_of(settings.model), "model_config_sha256": config_of(settings.model)}
    tokens = {"tokenizer_sha256": tokenizer_hash(settings.model)}
    return {"method": "ilql", **own, "data_sha256": data, **hashes, **tokens}


def _summary(output: Path, already_finished: bool) -> dict[str, Any]:
    facts = manifest.read(output) or {}
    told = {key: facts[key] for key in ("steps", "counts", "metrics", "seconds")}
    return {"output": str(output), **told, "already_finished": already_finished}


def _encode(
    records: list[CandidateSet], tokenizer: PreTrainedTokenizerBase, settings: ILQLSettings
) -> tuple[list[TokenList], dict[str, int]]:
    options = EncodeOptions(
        judge=RETURN,
        template=settings.template,
        max_length=settings.max_length,
        allow_special_in_text=settings.allow_special_in_text,
    )
    lists, counts = encode_all(records, tokenizer, options)
    if masked := next((t.id for t in lists if t.unlearned), ""):
        raise InputError(f"record {masked!r}: ILQL learns every token of an answer, results of tools among them")
    # A text without a prompt is learned from its first token on, which needs one before it to be predicted from.
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    lists = [t if t.prompt else TokenList(t.id, [start], t.responses, t.scores) for t in lists]
    if not lists:
        raise InputError("no sample has an answer to learn from")
    say_counts(counts)
    for sentence in said(counts):
        print(f"samples: {sentence}", file=sys.stderr)
    return lists, counts


def _batches(count: int, settings: ILQLSettings) -> Iterator[list[int]]:
    """Indices of each update, in a new order every epoch."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    each = -(-count // size)
    steps = settings.max_steps if settings.max_steps > 0 else settings.num_train_epochs * each
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(count, generator=generator).tolist()
        yield order[:size]
        order = order[size:]


def _fit(model: ILQLModel, lists: list[TokenList], settings: ILQLSettings) -> list[dict[str, float]]:
    """All updates; a line of losses for each."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    history: list[dict[str, float]] = []
    batches = list(_batches(len(lists), settings))
    with Progress("ilql", len(batches), "step") as progress:
        for batch in batches:
            line = _update(model, [lists[i] for i in batch], settings)
            norm = torch.nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
            if not torch.isfinite(norm):
                raise InputError(f"the gradient is not finite at step {len(history) + 1}; lower learning_rate")
            optimizer.step()
            optimizer.zero_grad()
            history.append({"step": len(history) + 1, **line, "grad_norm": float(norm)})
            if len(history) % settings.sync_steps == 0:
                model.sync(settings.alpha)
            progress.add()
    return history


def _update(model: ILQLModel, lists: list[TokenList], settings: ILQLSettings) -> dict[str, float]:
    """Gradients of one update, its losses means over all its tokens, whatever the micro-batches."""
    size, line = settings.per_device_train_batch_size, dict[str, float]()
    tokens = sum(len(t.responses[0]) for t in lists)
    for start in range(0, len(lists), size):
        part = lists[start : start + size]
        share = sum(len(t.responses[0]) for t in part) / tokens
        losses = model.losses(part, torch.tensor([t.scores[0] for t in part]), settings)
        (losses["loss"] * share).backward()  # type: ignore[no-untyped-call]
        for name, value in losses.items():
            line[name] = line.get(name, 0.0) + float(value.detach()) * share
    return line

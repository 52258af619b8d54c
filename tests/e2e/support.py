"""What works for which architecture, tried on one tiny random model a family: ``python -m tests.e2e.support``."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rankalign.data.records import CandidateSet, Response, write
from rankalign.models import delta, tiny
from rankalign.models import load as models
from rankalign.rows.logps import list_logps, supports_tree
from rankalign.training.arguments import parse_settings
from rankalign.training.run import train

PAGE = Path(__file__).resolve().parents[2] / "docs" / "support.md"
HEAD = """# Supported architectures

Written by `python -m tests.e2e.support`; do not edit. A random model of two layers of each family goes through:

* **RRHF**: two updates on two lists of three answers, and the saved folder loads again with other weights;
* **LoRA**: the same on an adapter over all linear layers, or over those named (`lora_target_modules`);
* **reward model**: two updates of `--method reward` from the policy; the saved folder loads in plain transformers;
* **layout**: what `layout: auto` takes. `tree` (prompts shared, nothing padded) where values and gradients on packed
  rows are those on padded rows, in float64 to 1e-5 (some models compute parts in float32 in any case); else `padded`;
* **delta**: made between start and result, applied, and every weight file back bit for bit.

A dash in the column of reward models means that transformers has no sequence classifier of the family. Families that
are not listed run if transformers loads them: rows are padded then, and the first batch is compared with the model's
own forward pass.

| family | class | RRHF | LoRA | reward model | layout | delta |
|---|---|---|---|---|---|---|
"""

_LLAMA = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
_NEOX = {key: value for key, value in _LLAMA.items() if key not in ("num_key_value_heads", "head_dim")}
_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# Family: (prefix of transformers' classes, settings of a tiny one).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2", _GPT),
    "GPT-J": ("GPTJ", {**_GPT, "rotary_dim": 2}),
    "GPT-Neo": (
        "GPTNeo",
        {**_NEOX, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "GPT-NeoX, Pythia": ("GPTNeoX", _NEOX),
    "GPT-BigCode": ("GPTBigCode", _GPT),
    "OPT": ("OPT", {**_NEOX, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "BLOOM": ("Bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "LLaMA, Alpaca, Vicuna": ("Llama", _LLAMA),
    "Mistral": ("Mistral", {**_LLAMA, "sliding_window": 8}),
    "Mixtral": ("Mixtral", {**_LLAMA, **_MOE}),
    "Qwen2": ("Qwen2", _LLAMA),
    "Qwen3": ("Qwen3", _LLAMA),
    "Qwen3, mixture of experts": ("Qwen3Moe", {**_LLAMA, **_MOE}),
    "Gemma": ("Gemma", _LLAMA),
    "Gemma 2": ("Gemma2", {**_LLAMA, "sliding_window": 8}),
    "Gemma 3, text": ("Gemma3Text", {**_LLAMA, "sliding_window": 8}),
    "Phi-3": ("Phi3", _NEOX),
    "Falcon": ("Falcon", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "Granite": ("Granite", _LLAMA),
    "Cohere": ("Cohere", _LLAMA),
    "Mamba": ("Mamba", {"hidden_size": 16, "num_hidden_layers": 2}),
}
# Where LoRA cannot take all linear layers: peft refuses Mamba's output projection, which its kernels bypass.
TARGETS = {"Mamba": "in_proj,x_proj"}
YES, NO = "✓", "–"


@dataclass(frozen=True)
class Row:
    """One line of the table; a cell is :data:`YES`, :data:`NO`, or a word."""

    family: str
    kind: str
    rrhf: str
    lora: str
    reward: str
    layout: str
    delta: str

    def line(self) -> str:
        """As Markdown."""
        return "| " + " | ".join(vars(self).values()) + " |"


def save(family: str, folder: Path) -> None:
    """A random model of the family with the tiny tokenizer, in ``folder``."""
    kind, settings = FAMILIES[family]
    tokenizer = tiny.build_tokenizer()
    common = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(11)
    config = getattr(transformers, kind + "Config")(**settings, **common, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def lists(path: Path) -> Path:
    """Two prompts with three scored answers each."""
    answers = (("a sea", 1.0), ("a red cat", 3.0), ("old", 2.0))
    sets = [
        CandidateSet(f"p{i}", prompt, [Response(text + "!" * i, "m", scores={"s": score}) for text, score in answers])
        for i, prompt in enumerate(("what is it", "and now"))
    ]
    write(path, sets)
    return path


def trained(model: Path, output: Path, **settings: Any) -> Path:
    """The folder of two updates on :func:`lists`.

    Raises:
        InputError: what the family cannot do.
    """
    content = {
        "model": str(model), "data": str(lists(output.with_suffix(".jsonl"))), "output_dir": str(output),
        "max_steps": 2, "template": "raw", "max_length": 60, "learning_rate": 1e-3, "warmup_steps": 0,
        "save_strategy": "no", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "use_cpu": True,
        "disable_tqdm": True, **settings,
    }  # fmt: skip
    assert train(parse_settings(content))["steps"] == 2
    return output


def changed(base: Path, result: Path) -> bool:
    """Whether a policy loads again, and answers otherwise than its start."""
    prompts, responses = [[5, 9, 7]], [[[30, 31, 32]]]
    with torch.no_grad():
        pair = [list_logps(models.load_policy(str(p)), prompts, responses) for p in (base, result)]
    return bool(torch.isfinite(pair[1]).all()) and not torch.equal(*pair)


def layout(base: Path) -> str:
    """``tree`` where packed rows give the padded ones' log-probabilities and gradients in float64, else ``padded``."""
    model = models.load_policy(str(base)).double()
    if not supports_tree(model):
        return "padded"
    prompts, responses = [[5, 9, 7, 20, 21], [8]], [[[30, 31, 32], [33], [34, 35]], [[40, 41], [42, 43, 44]]]
    found = []
    for rows in ("tree", "padded"):
        model.zero_grad()
        sums = list_logps(model, prompts, responses, layout=rows)
        (sums * torch.arange(6).view(2, 3)).sum().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat([sums.detach().flatten(), *grads]))
    assert len(found[0]) == len(found[1])
    worst = float((found[0] - found[1]).abs().max())
    assert worst < 1e-5, f"packed and padded rows differ by {worst}"
    return "tree"


def same_files(one: Path, other: Path) -> bool:
    """Whether the weight files of two folders are the same bytes under the same names."""
    files = sorted(p.name for p in one.glob("*.safetensors"))
    return bool(files) and all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


def graded(base: Path, output: Path) -> bool:
    """Whether two updates leave a reward model that plain transformers loads whole."""
    trained(base, output, method="reward", loss="bradley_terry")
    _, info = AutoModelForSequenceClassification.from_pretrained(output, output_loading_info=True)
    return not info["missing_keys"] and not info["unexpected_keys"]


def attempt(done: bool) -> str:
    """A cell of something that must have worked."""
    assert done
    return YES


def has_classifier(base: Path) -> bool:
    """Whether transformers has a sequence classifier of the family."""
    return type(models.load_policy(str(base)).config) in AutoModelForSequenceClassification._model_mapping


def examine(family: str, folder: Path) -> Row:
    """Everything on one family.

    Raises:
        AssertionError: something runs and comes out wrong.
        InputError: something is refused.
    """
    base = folder / "base"
    save(family, base)
    result = trained(base, folder / "rrhf")
    adapter = trained(base, folder / "lora", use_lora=True, lora_target_modules=TARGETS.get(family, "auto"))
    made, recovered = folder / "delta", folder / "recovered"
    delta.make(str(base), str(result), str(made))
    delta.apply(str(base), str(made), str(recovered))
    return Row(
        family,
        type(models.load_policy(str(base))).__name__,
        attempt(changed(base, result)),
        attempt(changed(base, adapter)) + (f" on {TARGETS[family]}" if family in TARGETS else ""),
        attempt(graded(base, folder / "reward")) if has_classifier(base) else NO,
        layout(base),
        attempt(same_files(result, recovered)),
    )


def page(rows: Iterable[Row]) -> str:
    """The whole page."""
    return HEAD + "\n".join(row.line() for row in rows) + "\n"


def on_page(row: Row) -> bool:
    """Whether the written page has this line."""
    return row.line() in PAGE.read_text(encoding="utf-8").splitlines()


def main(families: Mapping[str, Any] = FAMILIES) -> int:
    """Try every family, print the page and write it."""
    rows = []
    for family in families:
        print(family, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            rows.append(examine(family, Path(folder)))
    text = page(rows)
    print(text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

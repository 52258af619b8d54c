"""What works for which architecture, tried on one tiny random model a family: ``python -m tests.e2e.support``."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
import tempfile
import time
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
from rankalign.rows.logps import list_logps, supports_tree, why_padded
from rankalign.rows.wide import in_float64
from rankalign.training.arguments import parse_settings
from rankalign.training.run import train

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "support.md"
FOUND = ROOT / "runs" / "support.jsonl"  # a line a family, so that an interrupted run goes on
HEAD = """# Supported architectures

Written by `python -m tests.e2e.support` (`make support`) with transformers {version}; do not edit. A random model of
few layers of each family goes through:

* **RRHF**: two updates on two lists of three answers, and the saved folder loads again with other weights;
* **LoRA**: the same on an adapter over all linear layers, or over those named (`lora_target_modules`);
* **reward model**: two updates of `--method reward` from the policy; the saved folder loads in plain transformers;
* **DPO**: two updates of `--loss dpo --gradient_checkpointing true`, which begin at a loss of ln 2;
* **layout**: what `layout: auto` takes, by proof and not by name. `tree` (prompts shared, nothing padded) where values
  and gradients on packed rows are those on padded rows, here once more in float64 to 1e-9 of the largest; else
  `padded`, for the reason below the table;
* **delta**: made between start and result, applied, and every weight file back bit for bit.

A dash means that transformers has no sequence classifier of the family, or no checkpointing for it. Families that are
not listed run if transformers loads them: a small copy of each is tried on tree rows when it is first met, and the
first batch is compared with the model's own forward pass.

| family | class | RRHF | LoRA | reward model | DPO | layout | delta |
|---|---|---|---|---|---|---|---|
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
_ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_ROUTED |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT = {**_NEOX, **_ROUTED, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
_LATENT |= {"v_head_dim": 8}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_LINEAR |= {**_LLAMA, "layer_types": ["linear_attention", "full_attention"]}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 4, "mamba_d_state": 8, "mamba_expand": 2}
_WINDOWS = {**_LLAMA, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

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
    "Llama 4, text": ("Llama4Text", {**_LLAMA, **_MOE, "num_experts_per_tok": 1, "intermediate_size_mlp": 24}),
    "Mistral": ("Mistral", {**_LLAMA, "sliding_window": 8}),
    "Ministral": ("Ministral", _WINDOWS),
    "Ministral 3": ("Ministral3", _LLAMA),
    "Mixtral": ("Mixtral", {**_LLAMA, **_MOE}),
    "Qwen2": ("Qwen2", _LLAMA),
    "Qwen3": ("Qwen3", _LLAMA),
    "Qwen3, mixture of experts": ("Qwen3Moe", {**_LLAMA, **_MOE}),
    "Qwen3-Next": ("Qwen3Next", {**_LINEAR, **_MOE, "shared_expert_intermediate_size": 24}),
    "Qwen3.5, text": ("Qwen3_5Text", _LINEAR),
    "Gemma": ("Gemma", _LLAMA),
    "Gemma 2": ("Gemma2", {**_LLAMA, "sliding_window": 8}),
    "Gemma 3, text": ("Gemma3Text", {**_LLAMA, "sliding_window": 8}),
    "Gemma 4, text": (
        "Gemma4Text",
        {
            **_LLAMA, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 8, "global_head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": 512,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "Phi": ("Phi", _NEOX),
    "Phi-3, Phi-4": ("Phi3", _NEOX),
    "OLMo 2": ("Olmo2", _NEOX),
    "OLMo 3": ("Olmo3", _WINDOWS),
    "SmolLM3": ("SmolLM3", {**_LLAMA, "no_rope_layers": [1, 0]}),
    "GLM-4": ("Glm4", _LLAMA),
    "GLM-4, mixture of experts": ("Glm4Moe", {**_LLAMA, **_ROUTED}),
    "gpt-oss": ("GptOss", {**_WINDOWS, **_MOE}),
    "DeepSeek-V3": ("DeepseekV3", _LATENT),
    "Falcon": ("Falcon", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "Falcon-H1": ("FalconH1", {**_LLAMA, **_MAMBA, "mamba_d_ssm": 32}),
    "Granite": ("Granite", _LLAMA),
    "Granite 4, hybrid": (
        "GraniteMoeHybrid",
        {**_LLAMA, **_MAMBA, **_MOE, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 24},
    ),
    "Cohere": ("Cohere", _LLAMA),
    "Cohere 2": ("Cohere2", _WINDOWS),
    "LFM2": ("Lfm2", {**_LLAMA, "layer_types": ["conv", "full_attention"]}),
    "Nemotron-H": (
        "NemotronH",
        {
            **_LLAMA, **_ROUTED, "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 8,
            "ssm_state_size": 8, "n_groups": 1,
        },
    ),
    "Mamba": ("Mamba", {"hidden_size": 16, "num_hidden_layers": 2}),
}  # fmt: skip
# Where LoRA cannot take all linear layers: peft refuses Mamba's output projection, which its kernels bypass.
_BESIDE = "in_proj,q_proj,k_proj,v_proj"
TARGETS = {"Mamba": "in_proj,x_proj", "Falcon-H1": _BESIDE, "Nemotron-H": _BESIDE}
YES, NO = "✓", "–"


@dataclass(frozen=True)
class Row:
    """One line of the table; a cell is :data:`YES`, :data:`NO`, or some words.

    Attributes:
        why: the reason where rows are padded, which stands below the table.
    """

    family: str
    kind: str
    rrhf: str
    lora: str
    reward: str
    dpo: str
    layout: str
    delta: str
    why: str = ""

    def line(self) -> str:
        """As Markdown."""
        return "| " + " | ".join([value for name, value in vars(self).items() if name != "why"]) + " |"

    def note(self) -> str:
        """The reason as Markdown."""
        return f"* {self.family}: {self.why}" if self.why else ""


def save(family: str, folder: Path) -> None:
    """A random model of the family with the tiny tokenizer, in ``folder``."""
    kind, settings = FAMILIES[family]
    tokenizer = tiny.build_tokenizer()
    common = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(sum(family.encode()))  # references are kept by weights, and makes may differ in settings alone
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
        "disable_tqdm": True, "logging_steps": 1, **settings,
    }  # fmt: skip
    assert train(parse_settings(content))["steps"] == 2
    return output


def checkpointed(base: Path, output: Path) -> str:
    """Two updates of DPO under checkpointing, the first at ln 2."""
    if not models.load_policy(str(base)).supports_gradient_checkpointing:
        return NO
    result = trained(base, output, loss="dpo", gradient_checkpointing=True)
    log = [json.loads(line) for line in (result / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    first = next(line["loss"] for line in log if "loss" in line)
    return attempt(abs(first - math.log(2)) < 1e-4 and changed(base, result))


def changed(base: Path, result: Path) -> bool:
    """Whether a policy loads again, and answers otherwise than its start."""
    prompts, responses = [[5, 9, 7]], [[[30, 31, 32]]]
    with torch.no_grad():
        pair = [list_logps(models.load_policy(str(p)), prompts, responses) for p in (base, result)]
    return bool(torch.isfinite(pair[1]).all()) and not torch.equal(*pair)


def layout(base: Path) -> tuple[str, str]:
    """``tree`` where packed rows give the padded ones' log-probabilities and gradients in float64, else ``padded`` and
    why."""
    model = models.load_policy(str(base)).double()
    model.set_experts_implementation("eager")  # there are no grouped products of float64
    if not supports_tree(model):
        return "padded", why_padded(model)
    prompts, responses = [[5, 9, 7, 20, 21], [8]], [[[30, 31, 32], [33], [34, 35]], [[40, 41], [42, 43, 44]]]
    found = []
    for rows in ("tree", "padded"):
        model.zero_grad()
        with in_float64():
            sums = list_logps(model, prompts, responses, layout=rows)
        (sums * torch.arange(6).view(2, 3)).sum().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat([sums.detach().flatten(), *grads]))
    assert len(found[0]) == len(found[1])
    worst = float((found[0] - found[1]).abs().max() / found[1].abs().max())
    assert worst < 1e-9, f"packed and padded rows differ by {worst}"
    return "tree", ""


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
    rows, why = layout(base)
    return Row(
        family,
        type(models.load_policy(str(base))).__name__,
        attempt(changed(base, result)),
        attempt(changed(base, adapter)) + (f" on {TARGETS[family]}" if family in TARGETS else ""),
        attempt(graded(base, folder / "reward")) if has_classifier(base) else NO,
        checkpointed(base, folder / "dpo"),
        rows,
        attempt(same_files(result, recovered)),
        why.partition(": ")[2],
    )


def page(rows: Iterable[Row], version: str = transformers.__version__) -> str:
    """The whole page."""
    known = list(rows)
    notes = [row.note() for row in known if row.why]
    text = HEAD.format(version=version) + "\n".join(row.line() for row in known) + "\n"
    return text + "\nWhy rows are padded:\n\n" + "\n".join(notes) + "\n" if notes else text


def on_page(row: Row) -> bool:
    """Whether the written page has this line."""
    return row.line() in PAGE.read_text(encoding="utf-8").splitlines()


def found_before(path: Path) -> dict[str, Row]:
    """What an earlier run of the same versions has found, by family."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [Row(**line["row"]) for line in lines if line["transformers"] == transformers.__version__]
    return {row.family: row for row in rows}


def main(families: Mapping[str, Any] = FAMILIES, found: Path = FOUND, seconds: float = math.inf) -> int:
    """Try every family that is not known yet, until the time is up; print the page and write it when all are there."""
    start, known = time.monotonic(), found_before(found)
    found.parent.mkdir(parents=True, exist_ok=True)
    for family in families:
        known |= found_before(found)  # another run may be at it
        if family in known:
            continue
        if time.monotonic() - start > seconds:
            break
        print(family, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            try:
                known[family] = examine(family, Path(folder))
            except Exception as error:  # the others are still to be tried
                print(f"{family}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
        with open(found, "a", encoding="utf-8") as stream:
            line = {"transformers": transformers.__version__, "row": vars(known[family])}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    missing = [name for name in families if name not in known]
    if missing:
        print(f"not known yet: {', '.join(missing)}; run it again", file=sys.stderr)
        return 1
    text = page([known[name] for name in families])
    print(text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no family after so many seconds")
    parser.add_argument("--again", action="store_true", help="forget what earlier runs have found")
    given = parser.parse_args()
    if given.again:
        FOUND.unlink(missing_ok=True)
    sys.exit(main(seconds=given.seconds))

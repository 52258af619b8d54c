"""Settings: default < YAML < flag; a misspelt key is an error with a hint, never a default in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankalign.config import SampleConfig, ScoreConfig, load
from rankalign.engines import SamplingParams
from rankalign.errors import InputError
from rankalign.training.arguments import parse, split_flags

SAMPLE = """
prompts: p.jsonl
output: out.jsonl
policies:
  - {name: warm, temperature: 1, n: 2, stop: ["\\n\\nHuman:"]}
  - {name: people, engine: replay}
"""


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "c.yaml").write_text(text)
    return str(tmp_path / "c.yaml")


def test_yaml_then_flags(tmp_path: Path) -> None:
    config = load(SampleConfig, write(tmp_path, SAMPLE), output="flag.jsonl", seed=None)
    assert (config.prompts, config.output, config.seed) == ("p.jsonl", "flag.jsonl", 0)
    assert config.policies[0].sampling == SamplingParams(n=2, temperature=1.0, stop=("\n\nHuman:",))
    assert config.policies[1].engine == "replay"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SAMPLE + "promtps: x\n", "unknown key 'promtps' (did you mean 'prompts'?)"),
        (SAMPLE.replace("temperature", "temprature"), "unknown key 'temprature'"),
        (SAMPLE.replace("n: 2", "n: two"), "expected int, found 'two'"),
        (SAMPLE.replace("n: 2", "n: true"), "expected int, found True"),
        ("output: x\npolicies: []\n", "prompts is missing"),
        ("just text", "expected `key: value` lines"),
        ("a: [1\n", "not valid YAML"),
        ("prompts: p\noutput: o\npolicies: {name: x}\n", "policies: expected a list"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load(SampleConfig, write(tmp_path, text))
    assert message in str(caught.value)
    assert "c.yaml" in str(caught.value)


def test_scorer_options_stand_flat(tmp_path: Path) -> None:
    text = "input: i\noutput: o\nscorers:\n  - {name: v, kind: function, function: 'a:b', scale: 2}\n"
    config = load(ScoreConfig, write(tmp_path, text))
    assert config.scorers[0].options == {"function": "a:b", "scale": 2}


# --- training settings -------------------------------------------------------------------------------------------

RRHF_LINE = [
    "--model_name_or_path", "tiny", "--data_path", "d.json", "--bf16", "True", "--output_dir", "out",
    "--num_train_epochs", "3", "--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1",
    "--gradient_accumulation_steps", "8", "--evaluation_strategy", "no", "--save_strategy", "steps",
    "--save_steps", "100", "--save_total_limit", "40", "--learning_rate", "2e-5", "--weight_decay", "0.",
    "--warmup_ratio", "0.03", "--lr_scheduler_type", "cosine", "--logging_steps", "1",
    "--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer",
    "--tf32", "True", "--model_max_length", "192", "--rrhf_weight", "1",
]  # fmt: skip


def test_rrhf_command_line_parses_and_says_what_it_did() -> None:
    config, notes = parse(None, RRHF_LINE)
    assert (config.model, config.data, config.max_length, config.rrhf_weight) == ("tiny", "d.json", 192, 1.0)
    assert (config.warmup_steps, config.learning_rate, config.gradient_accumulation_steps) == (0.03, 2e-5, 8)
    assert config.loss_keywords() == {"rrhf_weight": 1.0}
    told = "\n".join(notes)
    for word in ("model_max_length", "warmup_ratio", "evaluation_strategy", "fsdp", "tf32", "bf16"):
        assert f"--{word}" in told


def test_yaml_below_flags(tmp_path: Path) -> None:
    path = write(tmp_path, "loss: dpo\nbeta: 0.3\nlearning_rate: 1.0e-6\nloss_options: {label_smoothing: 0.1}\n")
    config, _ = parse(path, ["--learning_rate=5e-6", "--use_lora"])
    assert (config.loss, config.learning_rate, config.use_lora) == ("dpo", 5e-6, True)
    assert config.loss_keywords() == {"beta": 0.3, "label_smoothing": 0.1}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1"], "unknown setting 'learning_rat' (did you mean 'learning_rate'?)"),
        (["--loss", "rhf"], "unknown loss 'rhf' (did you mean 'rrhf'?)"),
        (["--loss", "sft", "--beta", "1"], "loss 'sft' has no option 'beta'"),
        (["--learning_rate", "fast"], "learning_rate"),
        (["stray"], "unexpected argument 'stray'"),
        (["--fp16", "True"], "--fp16 needs a GPU"),
        (["--method", "magic"], "unknown method 'magic'"),
        (["--only_use_provide", "--only_use_sample"], "leave no response between them"),
    ],
)
def test_training_mistakes_are_named(flags: list[str], message: str) -> None:
    import torch

    if "--fp16" in flags and torch.cuda.is_available():
        pytest.skip("a GPU has fp16")
    with pytest.raises(InputError) as caught:
        parse(None, flags)
    assert message in str(caught.value)


def test_split_flags() -> None:
    assert split_flags(["--a", "1", "--b", "--c-d=x=y"]) == {"a": "1", "b": "True", "c_d": "x=y"}

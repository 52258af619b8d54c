"""The command lines of the systems that came before, word by word as their scripts and READMEs have them.

Only names of models, data and outputs are filled in, and the launcher's words before the script become
``rankalign train`` with what the script itself stood for (see docs/migrating.md).
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rankalign import cli
from rankalign.models import load as models
from rankalign.training.arguments import parse
from rankalign.training.old_names import modernise

GUIDE = Path(__file__).parents[2] / "docs" / "migrating.md"

RRHF = """--model_name_or_path $MODEL_PATH --data_path $DATA_PATH --bf16 True --output_dir $SAVE_PATH
--num_train_epochs 3 --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 8
--evaluation_strategy "no" --save_strategy "steps" --save_steps 100 --save_total_limit 40 --learning_rate 2e-5
--weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1 --fsdp "full_shard auto_wrap"
--fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer' --tf32 True"""
ALPACA = """--model_name_or_path $MODEL_PATH --data_path $DATA_PATH --output_dir $SAVE_PATH --num_train_epochs 3
--per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 16
--evaluation_strategy "no" --save_strategy "steps" --save_steps 2000 --save_total_limit 5 --learning_rate 2e-5
--weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1"""
DEEPSPEED = """--model_name_or_path $MODEL_PATH --data_path $DATA_PATH --output_dir $SAVE_PATH --num_train_epochs 3
--per_device_train_batch_size 2 --per_device_eval_batch_size 2 --gradient_accumulation_steps 8
--evaluation_strategy "no" --save_strategy "steps" --save_steps 2000 --save_total_limit 5 --learning_rate 2e-5
--weight_decay 0. --warmup_ratio 0.03 --deepspeed "scripts/ds_config_zero3_auto.json\""""
STANFORD = """--model_name_or_path $MODEL_PATH --data_path $DATA_PATH --bf16 True --output_dir $SAVE_PATH
--num_train_epochs 3 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 8
--evaluation_strategy "no" --save_strategy "steps" --save_steps 2000 --save_total_limit 1 --learning_rate 2e-5
--weight_decay 0. --warmup_ratio 0.03 --deepspeed "./configs/default_offload_opt_param.json" --tf32 True"""

SFT = "--method sft --template alpaca"
LORA = f"{SFT} --use_lora True --lora_r 8 --lora_alpha 16 --lora_dropout 0.05 --lora_target_modules q_proj,v_proj"

# Name: (what the script stood for, what was typed behind it).
LINES = {
    "RRHF train.sh": ("", f"{RRHF} --model_max_length 192 --rrhf_weight 1"),
    "RRHF train_wombat7b.sh": ("--template alpaca", f"{RRHF} --model_max_length 512 --rrhf_weight 1"),
    "RRHF train_wombat7b_gpt4.sh": ("", f"{RRHF} --model_max_length 512 --rrhf_weight 1"),
    "RRHF on one GPU": (
        "",
        RRHF.replace("auto_wrap", "auto_wrap offload") + " --model_max_length 192 --rrhf_weight 1 "
        "--only_use_provide False --only_use_sample False --stop_response True --length_penalty 1.0 "
        "--optim adamw_torch --cache_dir cache",
    ),
    "Open-ChatGPT train_alpaca.py": (SFT, ALPACA),
    "Open-ChatGPT train_alpaca.py, FSDP": (SFT, f'{ALPACA} --fsdp "full_shard auto_wrap offload"'),
    "Open-ChatGPT train_alpaca.py, DeepSpeed": (SFT, DEEPSPEED),
    "Open-ChatGPT train_alpaca_lora.py": (LORA, ALPACA.replace("size 1 ", "size 4 ").replace("steps 16", "steps 8")),
    "Stanford Alpaca, DeepSpeed offload": (SFT, STANFORD),
}
ON_ONE_CPU = {"fsdp", "deepspeed", "tf32"}
NOT_SETTINGS = {"fsdp_transformer_layer_cls_to_wrap", "cache_dir"}


def words_of(name: str, **paths: str) -> list[str]:
    """The line's words, its shell variables filled in."""
    before, typed = LINES[name]
    values = {"$MODEL_PATH": "tiny", "$DATA_PATH": "data.json", "$SAVE_PATH": "out", **paths}
    return [values.get(word, word) for word in shlex.split(f"{before} {typed}")]


@pytest.fixture
def beside_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the scripts' own DeepSpeed files lie; one that is not there is refused."""
    for name in ("scripts/ds_config_zero3_auto.json", "configs/default_offload_opt_param.json", "zero3.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def one_cpu_process(beside_the_files: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize("name", LINES)
def test_nothing_typed_is_dropped_without_a_word(name: str, one_cpu_process: None) -> None:
    words = words_of(name)
    config, notes = parse(None, words)
    told = "\n".join(notes)
    for flag, value in zip(words[::2], words[1::2], strict=True):
        key = flag.removeprefix("--")
        if not hasattr(config, key) or key in ON_ONE_CPU | NOT_SETTINGS:
            assert f"{flag} " in told
            continue
        found = getattr(config, key)
        found = getattr(found, "value", found)
        kind = type(found)
        wanted = value == "True" if kind is bool else kind(value)
        assert found == wanted, flag


@pytest.mark.parametrize("name", LINES)
def test_renamed_settings_keep_their_values(name: str, one_cpu_process: None) -> None:
    config, _ = parse(None, words_of(name))
    assert (config.model, config.data, config.warmup_steps) == ("tiny", "data.json", 0.03)
    assert getattr(config.eval_strategy, "value", config.eval_strategy) == "no"
    assert config.max_length == (192 if "192" in LINES[name][1] else 512)
    assert config.loss == ("rrhf" if name.startswith("RRHF") else "sft")
    assert config.use_lora == ("lora" in name)
    assert (config.fsdp or None, config.deepspeed, config.tf32 or None) == (None, None, None)


def test_under_a_launcher_sharding_stays(beside_the_files: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    found, notes = modernise({"fsdp": "full_shard auto_wrap", "deepspeed": "zero3.json"})
    assert found == {"fsdp": "full_shard auto_wrap", "deepspeed": "zero3.json"}
    assert not notes


def test_an_old_name_beside_its_new_one_is_told(one_cpu_process: None) -> None:
    config, notes = parse(None, ["--warmup_ratio", "0.1", "--warmup_steps", "7", "--optim", "adamw_hf"])
    assert config.warmup_steps == 7
    assert getattr(config.optim, "value", config.optim) == "adamw_torch"
    assert "--warmup_ratio 0.1 is left out: --warmup_steps is given as well" in notes
    assert "--optim adamw_hf is now --optim adamw_torch" in notes


def test_the_guide_has_these_lines(one_cpu_process: None) -> None:
    found = [line for line in GUIDE.read_text().splitlines() if line.startswith("rankalign train ")]
    given = [shlex.split(line)[2:] for line in found]
    for name in ("RRHF train.sh", *(name for name in LINES if name.startswith("Open") and "FSDP" not in name)):
        before, typed = LINES[name]
        assert shlex.split(f"{before} {typed}") in given, name
    assert len(given) == 5
    for words in given:
        parse(None, words)


def test_losses_by_their_names_in_trl(one_cpu_process: None) -> None:
    config, notes = parse(None, ["--loss_type", "sigmoid", "--use_peft", "--beta", "0.2"])
    assert (config.loss, config.use_lora, config.loss_keywords()) == ("dpo", True, {"beta": 0.2})
    assert notes == ["--loss_type sigmoid is now --loss dpo", "--use_peft True is now --use_lora True"]


def rrhf_file(path: Path) -> str:
    """RRHF's training lines: four samples, then the two responses of the data set."""
    rows = [
        {"query": f"\n\nHuman: question {i}\n\nAssistant:", "responses": [f"word {i} {j}" for j in range(6)]}
        for i in range(24)
    ]
    lines = [json.dumps({**row, "scores": [float((i + j) % 5) for j in range(6)]}) for i, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def alpaca_file(path: Path) -> str:
    """One JSON list, some rows with an input."""
    rows = [{"instruction": f"Say {i}", "input": "loud" * (i % 2), "output": f"Here: {i}"} for i in range(40)]
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.mark.parametrize(
    "name",
    [
        "RRHF train.sh",
        pytest.param("RRHF train_wombat7b.sh", marks=pytest.mark.slow),
        "Open-ChatGPT train_alpaca_lora.py",
        pytest.param("Open-ChatGPT train_alpaca.py, DeepSpeed", marks=pytest.mark.slow),
    ],
)
def test_the_line_trains(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_cpu_process: None) -> None:
    make = rrhf_file if name.startswith("RRHF") else alpaca_file
    paths = {"$DATA_PATH": make(tmp_path / "data.json"), "$SAVE_PATH": str(tmp_path / "out")}
    status = cli.main(["train", *words_of(name, **paths), "--max_steps", "2", "--disable_tqdm", "True", "--json"])
    told = capsys.readouterr()
    assert status == 0, told.err
    assert json.loads(told.out)["steps"] == 2
    assert "note: --model_name_or_path tiny is now --model tiny" in told.err
    if "lora" in name:
        adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert any(weight.abs().sum() > 0 for key, weight in adapter.items() if "lora_B" in key)
    else:
        trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        start = models.load_policy("tiny", dtype="float32")
        assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters(), strict=True))

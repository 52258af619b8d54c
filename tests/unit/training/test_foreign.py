"""Command lines of other trainers, flags as their documentation shows them: every setting is mapped or named."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from rankalign.cli import main
from rankalign.errors import InputError
from rankalign.losses import LOSSES
from rankalign.losses.reward import REWARD_LOSSES
from rankalign.training.arguments import PPOConfig, parse
from rankalign.training.foreign import Translation, translate_command
from rankalign.training.foreign_names import TOOLS

OPTIONS = {name for losses in (LOSSES, REWARD_LOSSES) for entry in losses.values() for name in entry.defaults}
KNOWN = {item.name for item in dataclasses.fields(PPOConfig)} | OPTIONS

# What they typed; what of it must stand in our settings; what must be named as left out.
COMMANDS: list[tuple[str, dict[str, Any], set[str]]] = [
    # TRL
    (
        "trl dpo --model_name_or_path M --dataset_name D --learning_rate 5.0e-7 --num_train_epochs 1 "
        "--per_device_train_batch_size 2 --max_steps 1000 --gradient_accumulation_steps 8 --eval_strategy steps "
        "--eval_steps 50 --output_dir O --no_remove_unused_columns",
        {"loss": "dpo", "model": "M", "data": "D", "learning_rate": 5e-7, "remove_unused_columns": False},
        set(),
    ),
    (
        "trl dpo --model_name_or_path M --dataset_name D --loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1.0",
        {"loss": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        set(),
    ),
    (
        "python trl/scripts/dpo.py --dataset_name D --model_name_or_path M --use_peft --lora_r 32 --lora_alpha 16",
        {"use_lora": True, "lora_r": 32, "lora_alpha": 16, "max_length": 1024},
        set(),
    ),
    (
        "accelerate launch --num_processes 8 --config_file examples/accelerate_configs/deepspeed_zero3.yaml "
        "examples/scripts/dpo.py --model_name_or_path M --dataset_name D --attn_implementation flash_attention_2 "
        "--torch_dtype bfloat16 --bf16 --logging_steps 10",
        {"dtype": "bfloat16", "bf16": True, "loss": "dpo"},
        {"attn_implementation"},
    ),
    (
        "trl sft --model_name_or_path M --dataset_name D --dataset_train_split a --dataset_test_split b "
        "--packing --max_length 2048 --learning_rate 2e-5",
        {"method": "sft", "max_length": 2048, "data": "D:a", "eval_data": "D:b"},
        {"packing"},
    ),
    (
        "trl reward --model_name_or_path M --dataset_name D --max_length 2048 --center_rewards_coefficient 0.01",
        {"method": "reward", "learning_rate": 1e-4, "max_length": 2048},
        set(),
    ),
    (
        "trl kto --model_name_or_path M --dataset_name D --desirable_weight 1.33 --undesirable_weight 1.0 --beta 0.1",
        {"loss": "kto", "desirable_weight": 1.33, "beta": 0.1},
        set(),
    ),
    (
        "python examples/scripts/cpo.py --model_name_or_path M --dataset_name D --loss_type simpo --cpo_alpha 0.0 "
        "--simpo_gamma 0.5 --beta 2.0",
        {"loss": "simpo", "gamma": 0.5, "nll_weight": 0.0, "beta": 2.0},
        set(),
    ),
    ("trl grpo --model_name_or_path M --dataset_name D --num_generations 8", {"loss": "grpo"}, {"num_generations"}),
    # LLaMA-Factory
    (
        "llamafactory-cli train --stage dpo --do_train --model_name_or_path M --dataset dpo_en_demo --template llama3 "
        "--finetuning_type lora --lora_target all --lora_rank 8 --pref_beta 0.1 --pref_loss sigmoid --cutoff_len 2048 "
        "--max_samples 1000 --overwrite_cache --preprocessing_num_workers 16 --output_dir O --plot_loss "
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 8 --learning_rate 5.0e-6 "
        "--num_train_epochs 3.0 --lr_scheduler_type cosine --warmup_ratio 0.1 --bf16 --ddp_timeout 180000000",
        {"loss": "dpo", "use_lora": True, "lora_r": 8, "lora_target_modules": "auto", "beta": 0.1,
         "warmup_steps": 0.1, "max_length": 2048, "ddp_timeout": 180000000},
        {"template", "max_samples", "plot_loss", "do_train", "overwrite_cache", "preprocessing_num_workers"},
    ),
    (
        "llamafactory-cli train --stage dpo --pref_loss orpo --finetuning_type full --deepspeed ds_z3.json "
        "--model_name_or_path M --dataset D",
        {"loss": "orpo", "deepspeed": "ds_z3.json"},
        set(),
    ),
    (
        "llamafactory-cli train --stage dpo --pref_loss simpo --simpo_gamma 0.5 --finetuning_type lora "
        "--quantization_bit 4 --model_name_or_path M --dataset a,b",
        {"loss": "simpo", "gamma": 0.5, "load_in_4bit": True, "data": "a,b"},
        set(),
    ),
    (
        "llamafactory-cli train --stage kto --pref_beta 0.1 --finetuning_type lora --model_name_or_path M --dataset D",
        {"loss": "kto", "beta": 0.1},
        set(),
    ),
    (
        "llamafactory-cli train --stage rm --finetuning_type lora --model_name_or_path M --dataset D --val_size 0.1",
        {"method": "reward", "use_lora": True, "eval_split": 0.1},
        set(),
    ),
    (
        "FORCE_TORCHRUN=1 llamafactory-cli train --stage sft --finetuning_type full --pure_bf16 --flash_attn fa2 "
        "--enable_liger_kernel --model_name_or_path M --dataset D",
        {"method": "sft", "bf16": True},
        {"flash_attn", "enable_liger_kernel", "pure_bf16 True"},
    ),
    # axolotl
    (
        "axolotl train --base-model M --rl dpo --sequence-len 4096 --micro-batch-size 2 --num-epochs 1 "
        "--optimizer adamw_bnb_8bit --lr-scheduler cosine --learning-rate 0.0002 --adapter lora --lora-r 32 "
        "--lora-alpha 16 --lora-dropout 0.05 --lora-target-linear --sample-packing --flash-attention",
        {"loss": "dpo", "max_length": 4096, "per_device_train_batch_size": 2, "use_lora": True, "lora_r": 32},
        {"lora_target_linear", "sample_packing", "flash_attention"},
    ),
    (
        "axolotl train --base-model M --rl orpo --orpo-alpha 0.1 --adapter qlora --val-set-size 0.05",
        {"loss": "orpo", "beta": 0.1, "load_in_4bit": True, "eval_split": 0.05},
        set(),
    ),
    (
        "accelerate launch -m axolotl.cli.train --base_model M --rl simpo --rl_beta 0.1 --cpo_alpha 1.0 "
        "--simpo_gamma 0.5 --chat_template llama3",
        {"loss": "simpo", "beta": 0.1, "gamma": 0.5, "nll_weight": 1.0},
        {"chat_template"},
    ),
    ("axolotl train --base-model M --rl kto --rl-beta 0.5 --bf16 auto", {"loss": "kto", "bf16": True}, set()),
    # losses that TRL makes of its sigmoid by a setting
    ("trl dpo --model_name_or_path M --dataset_name D --ld_alpha 0.3", {"loss": "ld_dpo", "alpha": 0.3}, set()),
    ("trl dpo --model_name_or_path M --dataset_name D --use_weighting", {"loss": "wpo_aligned"}, set()),
    ("trl dpo --model_name_or_path M --loss_type ipo --ld_alpha 0.3", {"loss": "ipo"}, {"ld_alpha 0.3"}),
    (
        "trl dpo --model_name_or_path M --dataset_name D --sync_ref_model --ref_model_sync_steps 64",
        {"loss": "dpo", "sync_ref_model": True, "ref_model_sync_steps": 64},
        set(),
    ),
    # ms-swift
    (
        "CUDA_VISIBLE_DEVICES=0 swift rlhf --rlhf_type dpo --model M --train_type lora --dataset D "
        "--torch_dtype bfloat16 --num_train_epochs 1 --per_device_train_batch_size 1 --learning_rate 1e-4 "
        "--lora_rank 8 --lora_alpha 32 --target_modules all-linear --gradient_accumulation_steps 16 "
        "--save_total_limit 5 --max_length 2048 --warmup_ratio 0.05 --dataloader_num_workers 4 --rpo_alpha 0.1",
        {"loss": "dpo", "use_lora": True, "dtype": "bfloat16", "nll_weight": 0.1, "lora_target_modules": "auto"},
        set(),
    ),
    (
        "NPROC_PER_NODE=4 swift rlhf --rlhf_type dpo --model M --train_type full --dataset D --deepspeed zero3 "
        "--attn_impl flash_attn --padding_free true --packing true",
        {"loss": "dpo", "deepspeed": "zero3"},
        {"attn_impl", "padding_free", "packing"},
    ),
    ("swift rlhf --rlhf_type orpo --model M --train_type lora --dataset D", {"loss": "orpo"}, set()),
    (
        "swift rlhf --rlhf_type rm --model M --train_type lora --dataset D --split_dataset_ratio 0.01",
        {"method": "reward", "eval_split": 0.01},
        set(),
    ),
    (
        "swift rlhf --rlhf_type kto --model M --train_type lora --quant_bits 4 --quant_method bnb "
        "--dataset a#500 b#500",
        {"loss": "kto", "load_in_4bit": True, "data": "a#500,b#500"},
        {"quant_method"},
    ),
    ("swift sft --model M --dataset D --train_type lora", {"method": "sft"}, set()),
    # OpenRLHF
    (
        "deepspeed --module openrlhf.cli.train_dpo --save_path O --save_steps -1 --logging_steps 1 --eval_steps -1 "
        "--train_batch_size 256 --micro_train_batch_size 2 --pretrain M --bf16 --max_epochs 1 --max_len 8192 "
        "--zero_stage 3 --learning_rate 5e-7 --beta 0.1 --dataset D --apply_chat_template --chosen_key chosen "
        "--rejected_key rejected --flash_attn --load_checkpoint --gradient_checkpointing",
        {"loss": "dpo", "gradient_accumulation_steps": 128, "save_strategy": "no", "eval_strategy": "no"},
        {"apply_chat_template", "chosen_key", "rejected_key", "flash_attn", "load_checkpoint"},
    ),
    (
        "deepspeed --module openrlhf.cli.train_dpo --pretrain M --dataset D --ipo --nll_loss_coef 0.2 "
        "--packing_samples",
        {"loss": "ipo", "nll_weight": 0.2},
        {"packing_samples"},
    ),
    (
        "deepspeed --module openrlhf.cli.train_rm --pretrain M --dataset D --lora_rank 16 --adam_betas 0.9 0.95 "
        "--l2 0.01",
        {"method": "reward", "use_lora": True, "lora_r": 16, "adam_beta2": 0.95, "weight_decay": 0.01},
        set(),
    ),
    (
        "deepspeed --module openrlhf.cli.train_dpo --ds.zero_stage 2 --ds.param_dtype bf16 --ds.packing_samples "
        "--train.micro_batch_size 8 --train.batch_size 64 --data.max_len 1024 --model.beta 0.1",
        {"dtype": "bfloat16", "max_length": 1024, "gradient_accumulation_steps": 8, "beta": 0.1},
        {"packing_samples"},
    ),
    ("deepspeed --module openrlhf.cli.train_sft --pretrain M --dataset D --max_len 2048", {"method": "sft"}, set()),
]  # fmt: skip


def translated(command: str) -> Translation:
    return translate_command(shlex.split(command), KNOWN)


@pytest.mark.parametrize(("command", "settings", "left"), COMMANDS)
def test_every_setting_is_mapped_or_named(command: str, settings: dict[str, Any], left: set[str]) -> None:
    done = translated(command)
    assert {name: done.settings.get(name) for name in settings} == settings
    assert {line.partition(":")[0] for line in done.left} == left
    assert set(done.settings) <= KNOWN | {"loss_weights"}


def test_each_flag_ends_somewhere() -> None:
    for command, _, _ in COMMANDS:
        done = translated(command)
        said = " ".join([*done.mapped, *done.left, *done.notes])
        for word in shlex.split(command.partition("openrlhf.cli")[2] or command):
            name = word.lstrip("-").replace("-", "_").rpartition(".")[2]
            if word.startswith("--") and name not in ("config_file", "module", "num_processes"):
                ours = done.settings.keys() | {name.removeprefix("no_") for name in done.settings}
                assert name in said or name in ours or name.removeprefix("no_") in ours, (command, word)


def test_the_settings_are_ones_that_train_takes(tmp_path: Path) -> None:
    for command, _, _ in COMMANDS:
        done = translated(command)
        machine = ("bf16", "deepspeed", "load_in_4bit", "optim", "dtype", "eval_strategy", "eval_steps")
        content = {name: value for name, value in done.settings.items() if name not in machine}
        path = tmp_path / "settings.yaml"
        path.write_text(json.dumps({**content, "output_dir": str(tmp_path)}))
        parse(str(path), [])


def test_defaults_of_trl_are_those_of_the_installed_one(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    kinds = {"dpo": "DPOConfig", "sft": "SFTConfig", "reward": "RewardConfig", "kto": "KTOConfig"}
    for kind, name in kinds.items():
        theirs = getattr(trl, name)(output_dir=str(tmp_path), use_cpu=True, bf16=False)
        told = TOOLS["trl"].defaults[kind]
        assert told == {key: getattr(theirs.lr_scheduler_type, "value", "") if key == "lr_scheduler_type" else
                        getattr(theirs, key) for key in told}  # fmt: skip


def test_files_tell_whose_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "theirs.yml"
    path.write_text(
        "base_model: M\nrl: dpo\ndatasets:\n  - {path: org/a, split: train_prefs, type: chatml.ultra}\n"
        "  - path: b.jsonl\nmicro_batch_size: 1\nwarmup_ratio: 0.1\nunheard_of: 3\nwandb_project:\n"
    )
    out = tmp_path / "ours.yaml"
    assert main(["convert-config", str(path), "--output", str(out)]) == 0
    said = capsys.readouterr().err
    assert "left: unheard_of: no setting of ours" in said
    assert "type chatml.ultra is not read" in said
    config, _ = parse(str(out), [])
    assert (config.loss, config.data, config.warmup_steps) == ("dpo", "org/a:train_prefs,b.jsonl", 0.1)
    (tmp_path / "own.yaml").write_text("x: 1\n")
    assert main(["convert-config", str(tmp_path / "own.yaml")]) == 1
    assert "say --from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("torchrun other.py --x 1", "no command of"),
        ("llamafactory-cli train --stage pt --model_name_or_path M", "llamafactory pt: no counterpart"),
        ("trl dpo nofile.yaml", "nofile.yaml: no such file"),
        ("trl vllm-serve --model M", "no counterpart"),
    ],
)
def test_what_has_no_counterpart_is_refused(command: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        translated(command)


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("llamafactory-cli train --stage dpo --model_name_or_path M --moe_aux_loss_coef 0.01", {}),
        ("python -m openrlhf.cli.train_dpo --pretrain M --aux_loss_coef 0.01", {}),
        (
            "swift rlhf --model M --router_aux_loss_coef 0.01 --train_type lora --target_parameters a b",
            {"a,b"},
        ),
        ("trl dpo --model_name_or_path M --router_aux_loss_coef 0.01 --use_peft --lora_target_parameters a b", {"a,b"}),
    ],
)
def test_settings_of_experts(command: str, settings: set[str]) -> None:
    found = translated(command).settings
    assert float(found["router_aux_loss_coef"]) == 0.01
    assert {found["lora_target_parameters"]} == settings if settings else "lora_target_parameters" not in found

"""Every flag of transformers' trainer works or is refused by name; values that make no sense are refused too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.training.arguments import parse, parse_settings
from rankalign.training.measures import measured_names
from rankalign.training.old_names import modernise
from rankalign.training.run import train
from rankalign.training.settings import LossSettings
from rankalign.training.trainer_flags import LIMITED, REFUSED

# A value other than the default for each refused flag.
GIVEN: dict[str, Any] = {
    "label_smoothing_factor": 0.1,
    "liger_kernel_config": {"rope": True}, "average_tokens_across_devices": False, "eval_do_concat_batches": False,
    "eval_accumulation_steps": 2, "include_for_metrics": ["inputs"], "label_names": ["labels"],
    "length_column_name": "size", "debug": "underflow_overflow", "hub_strategy": "end",
    "hub_token": "t", "hub_revision": "r", "include_num_input_tokens_seen": True, "remove_unused_columns": True,
    "logging_nan_inf_filter": True, "optim_target_modules": "q_proj",
}  # fmt: skip
# Flags that work, at a value that is not the default, in one run; together they make a whole run of two updates.
WORKING: dict[str, Any] = {
    "lr_scheduler_type": "linear", "optim": "adamw_torch", "optim_args": "", "adam_beta1": 0.8, "adam_beta2": 0.99,
    "adam_epsilon": 1e-7, "weight_decay": 0.1, "max_grad_norm": 0.5, "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False}, "neftune_noise_alpha": 1.0, "torch_empty_cache_steps": 1,
    "logging_strategy": "steps", "logging_first_step": True, "log_on_each_node": False, "log_level": "error",
    "log_level_replica": "error", "run_name": "name", "project": "name", "report_to": "none",
    "eval_strategy": "steps", "eval_steps": 1, "eval_delay": 1, "eval_on_start": True, "per_device_eval_batch_size": 2,
    "save_strategy": "steps", "save_only_model": True, "save_on_each_node": True, "load_best_model_at_end": True,
    "metric_for_best_model": "loss", "greater_is_better": False, "restore_callback_states_from_checkpoint": True,
    "data_seed": 3, "dataloader_drop_last": True, "dataloader_num_workers": 1, "dataloader_pin_memory": False,
    "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2, "train_sampling_strategy": "sequential",
    "dataloader_multiprocessing_context": "fork", "dataloader_in_order": False, "ddp_timeout": 600,
    "ddp_bucket_cap_mb": 5, "ddp_broadcast_buffers": False, "ddp_static_graph": False,
    "skip_memory_metrics": False, "do_train": True, "do_eval": True, "bf16": True, "trackio_space_id": "x",
    "trackio_bucket_id": "x", "trackio_static_space_id": "x", "lr_scheduler_kwargs": {},
}  # fmt: skip
# `parallelism_config` and `liger_kernel_config` take objects that no flag can write.
# Always given, or of launchers and machines that the numerics and e2e tests have; `full_determinism` is global.
ELSEWHERE = {
    "output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate", "warmup_steps",
    "gradient_accumulation_steps", "logging_steps", "disable_tqdm", "save_steps", "save_total_limit", "seed", "use_cpu",
    "fp16", "tf32", "fsdp", "fsdp_config", "deepspeed", "accelerator_config", "ddp_find_unused_parameters",
    "ddp_backend", "resume_from_checkpoint", "full_determinism", "local_rank", "activation_checkpointing",
    "activation_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "push_to_hub", "hub_model_id", "hub_private_repo",  # tests/unit/recipes/test_push.py, against a hub
}  # fmt: skip
FIELDS = [item.name for item in dataclasses.fields(TrainingArguments)]


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "scored.jsonl"
    answers = [Response("yes", scores={"j": 1.0}), Response("no", scores={"j": 0.0})]
    write(path, [CandidateSet(f"p{i}", f"Is it {i}?", answers) for i in range(4)])
    return str(path)


def content(data: str, tmp_path: Path, **more: Any) -> dict[str, Any]:
    usual = {"model": "tiny", "data": data, "use_cpu": True, "disable_tqdm": True, "max_steps": 2}
    return {**usual, "per_device_train_batch_size": 2, "output_dir": str(tmp_path / "run"), **more}


def test_no_flag_of_the_installed_transformers_is_left_out() -> None:
    named = [*REFUSED, *WORKING, *ELSEWHERE]
    assert set(FIELDS) == set(named)
    assert len(named) == len(set(named))
    assert set(FIELDS) >= set(LIMITED)
    assert not set(LIMITED) & set(REFUSED)


@pytest.mark.parametrize("name", sorted(set(REFUSED) - {"parallelism_config", "liger_kernel_config"}))
def test_a_refused_flag_is_named_with_its_reason(name: str) -> None:
    usual = next(item.default for item in dataclasses.fields(TrainingArguments) if item.name == name)
    with pytest.raises(InputError, match=f"--{name} .*{REFUSED[name][:20]}"):
        parse_settings({"use_cpu": True, name: GIVEN.get(name, usual is not True)})


def test_all_other_flags_make_a_run(data: str, tmp_path: Path) -> None:
    told = train(parse_settings(content(data, tmp_path, eval_data=data, save_steps=1, **WORKING)))
    assert told["steps"] == 2
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    figures = {key for line in lines for key in line if key.startswith("eval_")}
    assert {f"eval_{name}" for name in measured_names(LossSettings())} <= figures


@pytest.mark.parametrize(("loss", "method"), [("dpo", "rank"), ("orpo", "rank"), ("bradley_terry", "reward")])
def test_the_names_that_can_pick_a_checkpoint_are_those_of_a_measurement(
    loss: str, method: str, data: str, tmp_path: Path
) -> None:
    more = {"eval_data": data, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "save_strategy": "no"}
    train(parse_settings(content(data, tmp_path, loss=loss, method=method, **more)))
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    measured = next({key.removeprefix("eval_") for key in line} for line in lines if "eval_loss" in line)
    assert measured_names(LossSettings(loss=loss, method=method)) <= measured


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--train_sampling_strategy group_by_length", "not padded"),
        ("--report_to wandbb", "did you mean 'wandb'"),
        ("--optim galore_adamw", "galore_adamw is not for training"),
        ("--optim_args foo", "write NAME=VALUE"),
        ("--optim_args amsgrad=True", "adamw_torch_fused does not read it"),
        ("--optim sgd --optim_args momentum=0.9,amsgrad=True", "--optim_args amsgrad=True"),
        ("--lr_scheduler_type cosine_with_min_lr", "min_lr"),
        ("--lr_scheduler_type nosuch", "nosuch"),
        ("--eval_strategy steps --metric_for_best_model nosuch", "no measurement gives it"),
        ("--save_strategy best", "--save_strategy best needs"),
        ("--do_eval", "--eval_strategy"),
        ("--label_smoothing 0.1", "simpo"),
        ("--loss rrhf --gamma 1", "simpo, alphapo.* have, and --method ppo has"),
        ("--rollouts 4", "a setting of --method ppo"),
        ("--loss simpo --gamma 1 --loss_options {\"gamma\":2}", "give it once"),
        ("--loss dpo --pairs nosuch", "must be one of"),
        ("--loss dpo --label_smoothing word", "label_smoothing is a number"),
        ("--loss dpo --beta -0.1", "turn the preference round"),
        ("--loss dpo --loss_options {\"beta\":-0.1}", "turn the preference round"),
        ("--rrhf_weight -1", "turn the preference round"),
        ("--loss ipo --beta 0", "no preference left"),
        ("--loss dpo --beta nan", "not a finite number"),
        ("--learning_rate -1", "0 or more"),
        ("--learning_rate nan", "0 or more"),
        ("--seed -1", "0 or more"),
        ("--seed 4294967296", "below 2\\^32"),
        ("--per_device_train_batch_size 0", "above 0"),
        ("--gradient_accumulation_steps 0", "above 0"),
        ("--num_train_epochs 0", "above 0"),
        ("--max_length 0", "at least 2"),
        ("--max_length -1", "at least 2"),
        ("--max_length 1", "at least 2"),
        ("--max_candidates -1", "0 or more"),
        ("--logging_steps 0", "above 0"),
        ("--adam_beta1 1", "below 1"),
        ("--use_lora --lora_r 0", "above 0"),
        ("--use_lora --lora_dropout 1", "below 1"),
        ("--use_lora --lora_target_modules q_proj,,v_proj", "a name is empty"),
        ("--lora_r 8", "does nothing without --use_lora"),
        ("--ddp_backend gloo", "--ddp_backend needs a launcher"),
        ("--method ppo --reward m:f --neftune_noise_alpha 1", "--method ppo does not read --neftune_noise_alpha"),
        ("--method ppo --reward m:f --eval_strategy steps", "--method ppo does not read --eval_strategy"),
        ("--deepspeed nofile.json", "nofile.json: no such file"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(flags: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        parse(None, ["--use_cpu", "True", *flags.split()])


def test_a_file_of_deepspeed_that_is_no_json_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[1]"):
        (tmp_path / "ds.json").write_text(text)
        with pytest.raises(InputError, match=r"ds\.json"):
            parse(None, ["--deepspeed", str(tmp_path / "ds.json")])


def test_keywords_of_the_loss_may_be_flags() -> None:
    config, notes = parse(None, ["--use_cpu", "True", "--loss", "simpo", "--gamma", "1.5", "--pairs", "best-worst"])
    assert config.loss_keywords() == {"gamma": 1.5, "pairs": "best-worst"}
    assert len(notes) == 2
    assert parse_settings({"use_cpu": True, "loss": "dpo", "label_smoothing": 0.1}).loss_keywords() == {
        "label_smoothing": 0.1
    }


def test_a_bare_no_of_yaml_is_the_word(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("use_cpu: true\neval_strategy: no\nsave_strategy: no\nlogging_strategy: no\n")
    config, _ = parse(str(tmp_path / "c.yaml"), [])
    assert [config.eval_strategy, config.save_strategy, config.logging_strategy] == ["no", "no", "no"]


def test_lists_of_yaml_are_the_names_that_flags_join_by_commas(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("lora_target_modules: [q_proj, v_proj]\nuse_lora: true\nuse_cpu: true\n")
    config, _ = parse(str(tmp_path / "c.yaml"), [])
    assert config.lora_target_modules == "q_proj,v_proj"
    (tmp_path / "c.yaml").write_text("data: [a.jsonl, b.jsonl]\nuse_cpu: true\n")
    with pytest.raises(InputError, match=r"--data takes one file.*found 2; `rankalign convert"):
        parse(str(tmp_path / "c.yaml"), [])


@pytest.mark.parametrize(
    ("flag", "value"), [("max_steps", -7), ("max_steps", 0), ("warmup_ratio", 2), ("warmup_ratio", -0.1)]
)
def test_counts_and_shares_beyond_their_range_are_refused(flag: str, value: float) -> None:
    with pytest.raises(InputError, match=f"--{flag} {value:g} makes no sense"):
        parse(None, [f"--{flag}", str(value), "--use_cpu", "True"])


def test_one_update_is_made_at_the_full_rate(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(parse_settings(content(data, tmp_path, max_steps=1, learning_rate=1e-2)))
    line = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[0])
    assert line["learning_rate"] == 1e-2
    assert "no warm-up" in capsys.readouterr().err
    assert models.weights_fingerprint(tmp_path / "run") != models.weights_of("tiny")


def test_an_output_that_cannot_be_written_is_refused(data: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        train(parse_settings(content(data, tmp_path, output_dir=str(tmp_path / "file/run"))))


def test_names_of_layers_are_stripped_and_each_is_checked(data: str, tmp_path: Path) -> None:
    told = content(data, tmp_path, use_lora=True, max_steps=1)
    train(parse_settings({**told, "lora_target_modules": "q_proj, v_proj"}))
    adapted = json.loads((tmp_path / "run/adapter_config.json").read_text())["target_modules"]
    assert sorted(adapted) == ["q_proj", "v_proj"]
    with pytest.raises(InputError, match=r"'v_prj' .did you mean 'v_proj'"):
        train(parse_settings({**told, "lora_target_modules": "q_proj,v_prj", "overwrite": True}))


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_one_process_on_a_cpu_shares_with_nobody(
    name: str, launched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as a launcher starts one: what would shard is left out by name. Of two nothing is left out."""
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    value = {"fsdp": "full_shard auto_wrap", "deepspeed": str(tmp_path / "zero.json")}[name]
    words = {"use_cpu": "true", name: value, "fsdp_config": '{"min_num_params": 1}'}
    settings, notes = modernise(words)
    assert not {name, "fsdp_config"} & settings.keys()
    assert any(note.startswith(f"--{name} {value} is left out: this is one process") for note in notes)
    if launched:
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert modernise(words)[0][name] == value

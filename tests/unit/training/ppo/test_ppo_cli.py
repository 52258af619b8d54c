"""PPO from the command line: its settings, their mistakes, and one whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankalign.cli import main
from rankalign.errors import InputError
from rankalign.training.arguments import PPOConfig, parse, parse_settings

CONFIG = Path(__file__).resolve().parents[4] / "train_scripts" / "configs" / "ppo.yaml"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_coef": 0.1}, "--kl_coef is a setting of --method ppo"),
        ({"method": "ppo"}, "needs --reward"),
        ({"method": "ppo", "reward": "a:b", "loss": "dpo"}, "does not read --loss"),
        ({"method": "ppo", "reward": "a:b", "lora_dropout": 0.1}, "does not read --lora_dropout"),
        ({"method": "ppo", "reward": "a:b", "kl_estimator": "k9"}, "k9.*did you mean|k9.*one of"),
        ({"method": "ppo", "reward": "a:b", "scale_rewards": "runing"}, "did you mean 'running'"),
        ({"method": "ppo", "reward": "a:b", "rollout": 3}, "did you mean 'rollouts'"),
        ({"method": "ppo", "reward": "a:b", "temperature": 0}, "temperature"),
        ({"method": "ppo", "reward": "a:b", "gamma": 1.5}, "gamma"),
        ({"method": "ppo", "reward": "a:b", "ppo_epochs": 0}, "ppo_epochs"),
        ({"method": "ppo", "reward": "a:b", "clip_range": 0}, "clip_range"),
        ({"method": "ppo", "reward": "a:b", "kl_coef": -1}, "kl_coef"),
        ({"method": "ppo", "reward": "a:b", "kl_horizon": 0}, "kl_horizon"),
        ({"method": "ppo", "reward": "a:b", "reward_options": "[1]"}, "JSON object"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_settings({"use_cpu": True, **settings})


def test_flags_win_over_the_shipped_settings_and_those_over_defaults() -> None:
    config, _ = parse(str(CONFIG), ["--kl_coef", "0.5", "--use_cpu"])
    assert isinstance(config, PPOConfig)
    assert (config.kl_coef, config.rollouts, config.gamma, config.use_lora) == (0.5, 64, 1.0, True)
    assert not {"loss", "beta", "two_pass"} & set(config.own_settings())
    assert {"kl_coef", "rollouts", "learning_rate", "model"} <= set(config.own_settings())


def run(tmp_path: Path, *flags: str) -> int:
    rows = [{"id": f"p{i}", "prompt": f"prompt {i}"} for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text("def length(samples, outputs, **_):\n    return [len(o) for o in outputs]\n")
    fixed = ["train", "--json", "--method", "ppo", "--model", "tiny", "--data", str(tmp_path / "prompts.jsonl")]
    fixed += ["--rollouts", "8", "--max_new_tokens", "4", "--max_steps", "2", "--use_cpu", "--template", "raw"]
    return main([*fixed, "--output_dir", str(tmp_path / "run"), "--reward", f"{tmp_path}/rewards.py:length", *flags])


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--use_lora") == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert (result["steps"], result["already_finished"]) == (2, False)
    assert result["counts"]["prompts"] == 4
    assert "weights sha256" in told.err
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    wanted = {"reward", "kl", "kl_coef", "policy_loss", "value_loss", "clip_fraction", "entropy", "explained_variance"}
    assert all(wanted <= set(line) for line in log)
    assert run(tmp_path, "--use_lora") == 0
    assert json.loads(capsys.readouterr().out)["already_finished"]
    assert run(tmp_path, "--use_lora", "--kl_coef", "1") == 1
    assert "other settings" in capsys.readouterr().err


def test_what_cannot_be_had_is_said_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (("--reward", str(tmp_path / "nowhere")), "no such folder"),
        (("--reward", "tiny"), "is no reward model"),
        (("--reward", f"{tmp_path}/rewards.py:lenght"), "did you mean 'length'"),
        (("--data", str(tmp_path / "none.jsonl")), "no such file"),
        (("--max_length", "4"), "leaves no prompt"),
    ):
        assert run(tmp_path, *flags) == 1
        assert message in capsys.readouterr().err

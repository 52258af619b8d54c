"""Settings that only ``--method ppo`` has, and defaults that differ there."""

from __future__ import annotations

from dataclasses import dataclass

from rankalign.errors import InputError
from rankalign.registry import did_you_mean
from rankalign.training.flags import flag

KL_ESTIMATORS = ("k1", "k2", "k3")
SAMPLERS = ("hf", "vllm")
SCALES = ("none", "running", "ref", "whiten")

# Settings of rank training that PPO does not read: given with it, they are a mistake and not passed over.
FOREIGN = (
    "loss", "loss_options", "rrhf_weight", "length_penalty", "beta", "judge", "eval_data", "eval_split", "watch",
    "max_candidates", "only_use_provide", "only_use_sample", "stop_response", "freeze_layers", "pooling",
    "early_stopping", "two_pass", "token_budget", "disable_dropout", "lora_dropout", "dtype", "token_cache", "num_proc",
    "references", "batch_by", "router_aux_loss_coef", "lora_target_parameters", "sync_ref_model",
    "ref_model_mixup_alpha", "ref_model_sync_steps", "ref_model_bema",
)  # fmt: skip


@dataclass
class PPOSettings:
    """What PPO depends on beside the settings of every method; a step is one iteration of rollouts and updates."""

    reward: str = flag(
        "",
        "who grades: module:function, file.py:function, a reward model (folder, hub id, tiny-rm) or a server's http://...",
    )
    reward_options: str = flag("{}", "options of that scorer: a JSON object, or a mapping in YAML")
    reward_baseline: str = flag("", "policy in the data whose answer's score is subtracted from its prompt's scores")
    scale_rewards: str = flag("none", "divide scores by a standard deviation: running, ref (first step's); or whiten")
    clip_reward: float = flag(10.0, "scores are kept within this; 0 does not")
    sampler: str = flag("hf", "who samples: hf, or vllm, to which the weights are handed at each step")
    rollouts: int = flag(128, "answers sampled a step")
    max_new_tokens: int = flag(64, "most tokens of an answer")
    temperature: float = flag(1.0, "of sampling; log-probabilities are taken at the same temperature")
    ppo_epochs: int = flag(4, "passes over the answers of a step")
    kl_coef: float = flag(0.05, "weight of the KL penalty (its first value where kl_target is set)")
    kl_target: float = flag(0.0, "KL an answer, in nats, that the weight is adapted to; 0 keeps it fixed")
    kl_horizon: float = flag(10000.0, "answers in which the weight changes by a fifth at most")
    kl_estimator: str = flag("k1", "of the penalty: k1, k2 or k3")
    gamma: float = flag(1.0, "discount")
    gae_lambda: float = flag(0.95, "lambda of the advantage estimates")
    clip_range: float = flag(0.2, "how far the probability ratio may move to the good")
    value_clip_range: float = flag(0.2, "how far a value may move in a step")
    vf_coef: float = flag(0.2, "weight of the value loss")
    value_model: str = flag("", "a value network of its own: a folder or hub id; empty is a head on the policy")

    output_dir: str | None = flag("runs/ppo", "where checkpoints, log.jsonl, the final model and the manifest go")
    learning_rate: float = flag(1e-5, "peak learning rate, of policy and values alike")
    per_device_train_batch_size: int = flag(8, "answers a micro-batch")
    save_steps: float = flag(10, "steps between checkpoints")

    def check_ppo(self) -> None:
        """Refuse values that make no sense.

        Raises:
            InputError: naming the first of them.
        """
        if not self.reward:
            raise InputError("--method ppo needs --reward: module:function, file.py:function, a model or http://...")
        for name, known in (("sampler", SAMPLERS), ("scale_rewards", SCALES), ("kl_estimator", KL_ESTIMATORS)):
            if getattr(self, name) not in known:
                raise InputError(f"unknown --{name} {getattr(self, name)!r}{did_you_mean(getattr(self, name), known)}")
        for problem, found in self._problems().items():
            if found:
                raise InputError(problem)

    def _problems(self) -> dict[str, bool]:
        return {
            "--rollouts, --ppo_epochs and --max_new_tokens must be at least 1": min(
                self.rollouts, self.ppo_epochs, self.max_new_tokens
            )
            < 1,
            "--temperature must be above 0: PPO learns from what it draws": not self.temperature > 0,
            "--gamma and --gae_lambda are shares from 0 to 1": not (0 <= self.gamma <= 1 and 0 <= self.gae_lambda <= 1),
            "--clip_range and --value_clip_range must be above 0": not min(self.clip_range, self.value_clip_range) > 0,
            "--kl_coef, --kl_target, --vf_coef and --clip_reward must not be negative": not min(
                self.kl_coef, self.kl_target, self.vf_coef, self.clip_reward
            )
            >= 0,
            "--kl_horizon must be above 0": not self.kl_horizon > 0,
        }

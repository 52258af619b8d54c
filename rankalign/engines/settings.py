"""What the answers of a policy depend on."""

from __future__ import annotations

from typing import Any

from rankalign.engines import Policy, identity
from rankalign.storage.code import hash_of, is_code
from rankalign.storage.sources import sha256_of


def policy_settings(policy: Policy) -> dict[str, Any]:
    """Everything a policy's answers depend on, weights and replayed files by content."""
    settings = identity(policy)
    if policy.engine in ("hf", "vllm"):
        from rankalign.models import load as models  # imports torch, which a scorer that is a function does without
        from rankalign.models.identity import config_of, text_of

        for key in ("model", "adapter"):
            settings[f"{key}_sha256"] = models.weights_of(settings[key]) if settings[key] else ""
            settings[f"{key}_config_sha256"] = config_of(settings[key]) if settings[key] else ""
        settings["text_sha256"] = text_of(policy.model)
    if is_code(policy.engine):
        settings["engine_sha256"] = hash_of(policy.engine)
    if policy.file:
        settings["file_sha256"] = sha256_of(policy.file)
    return settings

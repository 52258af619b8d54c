"""Seeds for samplers that are not ours: servers and other libraries draw their numbers themselves."""

from __future__ import annotations

import hashlib
import json


def request_seed(seed: int, prompt_id: str, policy: str, index: int) -> int:
    """31 bits of SHA-256 over the JSON list of the arguments: what samplers take as a seed, on any machine the same."""
    digest = hashlib.sha256(json.dumps([seed, prompt_id, policy, index]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1

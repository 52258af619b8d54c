"""Reward scores of eight candidates a prompt: prompts shared in tree rows, against one by one and against padded rows.

    python -m benchmarks.scoring [--write]

The model is a reward model of SmolLM2-135M's shape with random fp32 weights, read by transformers' own
AutoModelForSequenceClassification classes in the baselines. Scores are compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.measure import Row, Steps, Tokens, draw, main, smollm_config
from rankalign.rows.rewards import list_rewards

PROMPTS, CANDIDATES = 4, 8


def reward_model() -> Any:
    torch.manual_seed(0)
    config = smollm_config()
    config.num_labels, config.pad_token_id = 1, 0
    model: Any = transformers.LlamaForSequenceClassification
    return model(config).eval()


@torch.no_grad()
def plain(model: Any, rows: list[Tokens]) -> Tensor:
    """Scores of rows of one length, as transformers gives them."""
    ids = torch.tensor(rows)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0]


def against(batch: int) -> Callable[[Any], Steps]:
    def build(_: Any) -> Steps:
        model = reward_model()
        prompts = [[max(t, 1) for t in draw(128, p)] for p in range(PROMPTS)]
        responses = [
            [[max(t, 1) for t in draw(96, 100 + CANDIDATES * p + n)] for n in range(CANDIDATES)] for p in range(PROMPTS)
        ]
        rows = [p + r for p, some in zip(prompts, responses, strict=True) for r in some]

        @torch.no_grad()
        def ours() -> Tensor:
            pairs = zip(prompts, responses, strict=True)
            return torch.cat([list_rewards(model, [p], [some], layout="tree")[0] for p, some in pairs])

        def baseline() -> Tensor:
            return torch.cat([plain(model, rows[start : start + batch]) for start in range(0, len(rows), batch)])

        difference = float((ours() - baseline()).abs().max())
        return Steps(ours, baseline, f"scores differ by at most {difference:.0e}", model=model)

    return build


TITLE = f"reward scores, {PROMPTS} prompts, N={CANDIDATES}, P=128 R=96"
ROWS = {
    "reward-one-by-one": Row(TITLE, "transformers, one by one", 1.9, None, against(1)),
    "reward-padded": Row(TITLE, "transformers, padded batches of 8", 1.7, None, against(8)),
}

if __name__ == "__main__":
    main("benchmarks.scoring", ROWS, __doc__)

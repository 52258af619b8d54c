"""Text through models of pictures and text: tree rows and two passes give what one text at a time gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from rankalign.rows.logps import choose_layout, list_logps
from rankalign.rows.two_pass import backward_two_pass
from tests.numerics.test_logps import GROUPED, StayWide, gradients, largest_error, lists, one_by_one, padded_sum, weigh

EYE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
EYE |= {"image_size": 28, "patch_size": 14}
ANGLES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
QWEN_EYE = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16, "intermediate_size": 24}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("Gemma3", GROUPED, EYE),
    "mistral3": ("Mistral3", GROUPED | {"model_type": "mistral"}, EYE | {"model_type": "pixtral"}),
    "qwen2.5-vl": ("Qwen2_5_VL", GROUPED | {"rope_parameters": ANGLES}, QWEN_EYE),
    "smolvlm": ("SmolVLM", GROUPED | {"model_type": "llama"}, EYE),
}


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_one_text_at_a_time(name: str) -> None:
    kind, text, eye = MODELS[name]
    config = getattr(transformers, kind + "Config")(text_config=text, vision_config=eye)
    torch.manual_seed(0)
    model = getattr(transformers, kind + "ForConditionalGeneration")(config).double().train()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    prompts, responses = lists()
    with StayWide():
        reference = padded_sum(one_by_one(model, prompts, responses))
        expected = gradients(model, weigh(reference))
        found = list_logps(model, prompts, responses, layout="tree")
        slopes = gradients(model, weigh(found))
        model.zero_grad()
        backward_two_pass(model, prompts, responses, weigh, 16, layout="tree")
    torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-12)
    assert largest_error(slopes, expected) < 1e-10
    twice = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert largest_error(twice, expected) < 1e-10
    assert choose_layout(model, prompts, responses)[0] == "tree"

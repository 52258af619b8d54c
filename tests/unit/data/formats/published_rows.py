"""Rows in the columns of published data sets, their texts made up here."""

from __future__ import annotations

from typing import Any

USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
OTHER = {"role": "assistant", "content": "No idea."}
PKU = {
    "prompt": "Why?",
    "response_0": "a",
    "response_1": "b",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 0,
    "safer_response_id": 0,
}
NECTAR = [{"answer": "a", "model": "m", "rank": 2.0}, {"answer": "b", "model": "n", "rank": 1.0}]
BATTLE = {
    "question_id": "q",
    "model_a": "m",
    "model_b": "n",
    "winner": "model_b",
    "conversation_a": [USER, ASSISTANT],
    "conversation_b": [USER, OTHER],
}


PUBLISHED: dict[str, list[dict[str, Any]]] = {
    "pku": [
        PKU,
        PKU | {"better_response_id": 1, "response_0_source": "m", "response_1_source": "n", "harm": {"x": True}},
    ],
    "helpsteer": [
        {
            "prompt": "Why?",
            "response": "a",
            "helpfulness": 3,
            "correctness": 4,
            "coherence": 4,
            "complexity": 1,
            "verbosity": 1,
        },
        {"prompt": "Why?\n<extra_id_1>Assistant\nSo.\n<extra_id_1>User\nSure?", "response": "b", "helpfulness": 0},
        {"split": "train", "prompt": "Why?", "response_1": "a", "response_2": "b", "preference_strength": -2},
        {
            "domain": "g",
            "language": "en",
            "context": [USER],
            "response1": "a",
            "response2": "b",
            "overall_preference": 3,
        },
    ],
    "nectar": [
        {
            "prompt": "\n\nHuman: Why?\n\nAssistant: ",
            "answers": NECTAR,
            "turns": 1,
            "source": ["x"],
            "good_natured": True,
        },
    ],
    "arena-battles": [
        BATTLE,
        BATTLE | {"winner": "tie (bothbad)", "turn": 1, "anony": True, "language": "English"},
        {
            "id": 3,
            "model_a": "m",
            "model_b": "n",
            "prompt": '["Why?"]',
            "response_a": '["a"]',
            "response_b": '["b"]',
            "winner_model_a": 0,
            "winner_model_b": 1,
            "winner_tie": 0,
        },
    ],
    "beavertails": [{"prompt": "Why?", "response": "a", "category": {"x": False}, "is_safe": False}],
    "distilabel": [
        {
            "instruction": "Why?",
            "generations": ["a", "b"],
            "generation_models": ["m", "n"],
            "ratings": [5, None],
            "rationales": ["x", "y"],
        },
    ],
    "openhermes-preferences": [
        {
            "source": "s",
            "prompt": "Why?",
            "candidates_completions": ["a", "b", "c"],
            "candidate_policies": ["m", "n", "o"],
            "ranks": [2, 1, 3],
            "rank_str": "n > m > o",
            "chosen": [USER, ASSISTANT],
            "rejected": [USER, OTHER],
            "chosen_policy": "n",
            "rejected_policy": "o",
        },
    ],
    "prometheus": [
        {
            "orig_instruction": "Why?",
            "orig_response_A": "a",
            "orig_response_B": "b",
            "orig_score_A": "5",
            "orig_score_B": "1",
            "orig_preference": "A",
            "instruction": "###Task",
            "output": "A is better",
        },
        {
            "orig_instruction": "Why?",
            "orig_response": "a",
            "orig_score": "4",
            "instruction": "###Task",
            "output": "[RESULT] 4",
        },
    ],
    "ultrainteract": [
        {
            "id": "u",
            "parent_id": "t",
            "task": "Math",
            "trajectory": [{"from": "user", "value": "Why?"}],
            "chosen": "a",
            "rejected": "b",
        },
    ],
    "best-of-n": [
        {"prompt": [USER], "responses": ["a", "b", "c"], "rewards": [1, 2.5, None]},
        {
            "question": "Why?",
            "candidates": [{"text": "a", "reward": 1, "model": "m"}, {"text": "b", "reward": 2, "model": "n"}],
        },
        {"prompt": "Why?", "all_generated_responses": ["a", "b"], "all_rm_scores": [0.5, 0.25]},
        {"messages": [USER], "completions": [[ASSISTANT], [OTHER]]},
    ],
    "pairs": [
        {"instruction": "Why?", "response_a": "a", "response_b": "b", "winner": "B"},
        {"prompt": [USER], "chosen_response": "a", "rejected_response": "b"},
        {"question": "Why?", "answer1": "a", "answer2": "b", "preference": "tie", "model_1": "m", "model_2": "n"},
    ],
    "prompt-response": [
        {"instruction": "Sum up.", "context": "News.", "response": "Nothing new.", "category": "summary"},
        {"instruction": "Why?", "context": "", "response": "a", "category": "qa"},
        {"id": 4, "question": "Why?", "answer": "a", "rating": 2},
        {"messages": [USER], "response": [ASSISTANT]},
    ],
}

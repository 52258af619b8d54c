"""Prompt strings that published models were trained on, byte for byte, and where an answer ends."""

from __future__ import annotations

import pytest

from rankalign.data.templates import cut_at_stop, render, stops
from rankalign.errors import InputError

USER = [{"role": "user", "content": "Name a colour."}]
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Name a colour."},
]


def test_alpaca_without_input() -> None:
    assert render(USER, "alpaca") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a colour.\n\n### Response:"
    )


def test_alpaca_with_input() -> None:
    meta = {"alpaca": {"instruction": "Translate {this}.", "input": "a {b}\nc"}}
    assert render([{"role": "user", "content": "ignored"}], "alpaca", meta=meta) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nTranslate {this}.\n\n### Input:\na {b}\nc\n\n### Response:"
    )


def test_alpaca_empty_input_takes_the_short_form() -> None:
    meta = {"alpaca": {"instruction": "Name a colour.", "input": ""}}
    assert render(USER, "alpaca", meta=meta) == render(USER, "alpaca")


def test_alpaca_refuses_dialogues() -> None:
    with pytest.raises(InputError, match="takes one user message, found 3"):
        render(TURNS, "alpaca")


def test_vicuna() -> None:
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    assert render(TURNS, "vicuna") == f"{system} USER: Hi ASSISTANT: Hello!</s> USER: Name a colour. ASSISTANT:"


def test_hh() -> None:
    assert render(TURNS, "hh") == "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Name a colour.\n\nAssistant:"
    assert render("Name a colour.", "hh") == "\n\nHuman: Name a colour.\n\nAssistant:"


def test_rendered_strings_stay() -> None:
    text = "\n\nHuman: Hi\n\nAssistant:"
    assert all(render(text, name) == text for name in ("raw", "hh", "alpaca", "vicuna"))


def test_system_message() -> None:
    assert render(USER, "raw", system="Be brief.") == "Be brief.\n\nName a colour."
    assert render([{"role": "system", "content": "Own."}, *USER], "raw", system="Be brief.").startswith("Own.")


def test_unknown_template() -> None:
    with pytest.raises(InputError, match=r"unknown template 'alpacca' \(did you mean 'alpaca'\?\)"):
        render(USER, "alpacca")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Blue.\n\nHuman: And?", ("Blue.", True)),
        ("A\n\nassistant: B\n\nHuman: C", ("A", True)),
        ("no marks ", ("no marks ", False)),
        ("\n\nHuman: at once", ("", True)),
        ("Human: inline is text", ("Human: inline is text", False)),
    ],
)
def test_first_stop_wins(text: str, expected: tuple[str, bool]) -> None:
    assert cut_at_stop(text, stops("hh")) == expected

"""Published data sets by their names, to be read: which format a set is in, or which of its columns are what.

A line of :data:`DATASETS` each. A column written with dots and brackets, ``answers.ja[0].text``, leads into the row,
and ``replies[]`` stands for every element; such columns stay whole in ``meta``, as do those that are not named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rankalign.data.formats import FORMATS, Format, Losses
from rankalign.data.formats.common import RowFormat, instruction_text
from rankalign.data.formats.kept import keep
from rankalign.data.records import PREFERENCE, CandidateSet, Checker, Message, Prompt, Response
from rankalign.errors import InputError
from rankalign.registry import Entry, Registry

READERS = Registry(
    "format", {**FORMATS, "oasst": Entry("rankalign.data.formats.oasst:FORMAT", "trees of messages (OpenAssistant)")}
)
VERDICTS = {"chosen": 1.0, "rejected": 0.0}
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d*)\]")


@dataclass(frozen=True)
class Alias:
    """A data set in the shape of a format."""

    form: str

    @property
    def summary(self) -> str:
        """One line for ``rankalign ls``."""
        return f"data set, read as {self.form}"

    def open(self) -> Format:
        """The format."""
        found: Format = READERS.load(self.form)
        return found


@dataclass(frozen=True)
class Mapped(RowFormat):
    """A data set with columns of its own.

    Attributes:
        prompt: column of the prompt: one user message, or a dialogue where ``marks`` are given.
        answers: column of each answer by policy; ``chosen`` and ``rejected`` are scored 1 and 0 by ``preference``.
            Without any, the answer is the dialogue's last turn.
        context: column of an instruction's input, joined as Alpaca's.
        history: column of earlier exchanges, each a question and its answer.
        marks: what stands before a user's and before an assistant's turn.
        ends: what may stand behind a turn and is cut off.
        verbatim: whether the prompt stands in a template already and stays the text it is.
    """

    name: ClassVar[str] = "alpaca"
    strict: ClassVar[bool] = False  # who names the data set knows its columns

    prompt: str = "prompt"
    answers: Mapping[str, str] = field(default_factory=dict)
    context: str = ""
    history: str = ""
    marks: tuple[str, str] = ("", "")
    ends: str = ""
    verbatim: bool = False

    @property
    def summary(self) -> str:
        """One line for ``rankalign ls``."""
        return "data set: " + ", ".join(filter(None, (self.prompt, self.context, self.history, *self.answers.values())))

    def open(self) -> Format:
        """The reader."""
        return self

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row."""
        (_, asked), *_ = values(row, self.prompt, check)
        text, parts = check.text(asked, self.prompt), dict[str, str]()
        if self.context:
            parts = {"instruction": text, "input": check.text(check.need(row, self.context), self.context)}
            text = instruction_text(text, parts["input"])
        turns = self._turns(text)
        responses = [self._answer(*answer, check) for answer in self._answers(row, check)]
        if not self.answers:
            if turns[-1]["role"] != "assistant":
                raise check.fail(self.prompt, f"does not end with a turn of {self.marks[1]!r}")
            responses = [Response(turns.pop()["content"], policy="output")]
        prompt: Prompt = text if self.verbatim else [*self._exchanges(row, check), *turns]
        used = (self.prompt, self.context, self.history, *self.answers.values())
        return CandidateSet("", check.prompt(prompt, self.prompt), responses, keep(self.name, parts, row, used))

    def _turns(self, text: str) -> list[Message]:
        """A text as messages, cut at the marks; what stands before the first is a system message."""
        if not self.marks[0]:
            return [{"role": "user", "content": text}]
        roles = dict(zip(self.marks, ("user", "assistant"), strict=True))
        lead, *pieces = re.split(f"({'|'.join(map(re.escape, self.marks))})", text)
        if not pieces:
            return [{"role": "user", "content": text}]
        turns = [{"role": "system", "content": lead.strip()}] if lead.strip() else []
        for mark, piece in zip(pieces[::2], pieces[1::2], strict=True):
            turns.append({"role": roles[mark], "content": re.sub(self.ends, "", piece).strip()})
        return turns

    def _answers(self, row: dict[str, Any], check: Checker) -> Iterator[tuple[str, str, Any]]:
        for policy, column in self.answers.items():
            yield from ((policy, at, value) for at, value in values(row, column, check))

    def _answer(self, policy: str, at: str, value: Any, check: Checker) -> Response:
        """An answer; where the prompt has marks, what stands behind the last one."""
        text = check.text(value, at)
        if self.marks[1] and self.marks[1] in text:
            text = text.rpartition(self.marks[1])[2].strip()
        scores: dict[str, float | None] = {PREFERENCE: VERDICTS[policy]} if policy in VERDICTS else {}
        return Response(text, policy=policy, scores=scores)

    def _exchanges(self, row: dict[str, Any], check: Checker) -> Iterator[Message]:
        for index, pair in enumerate(check.array(row.get(self.history) or [], self.history)):
            at = f"{self.history}[{index}]"
            for side, role in enumerate(("user", "assistant")):
                text = check.array(pair, at, at_least=2)[side]
                yield {"role": role, "content": check.text(text, f"{at}[{side}]")}

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """None: data sets are read only."""
        raise InputError("a data set's name is for reading; write one of the formats")


def values(row: dict[str, Any], column: str, check: Checker) -> Iterator[tuple[str, Any]]:
    """Where ``column`` leads in a row: paths and values.

    Raises:
        RecordError: it leads nowhere.
    """
    found: list[tuple[str, Any]] = [("", row)]
    for key, index in _STEP.findall(column):
        if key:
            steps = [(at, key, check.need(check.mapping(value, at), key, at)) for at, value in found]
            found = [(f"{at}.{key}" if at else key, value) for at, key, value in steps]
        else:
            found = [inner for at, value in found for inner in _elements(at, value, index, check)]
    yield from found


def _elements(at: str, value: Any, index: str, check: Checker) -> list[tuple[str, Any]]:
    elements = check.array(value, at, at_least=int(index or 0) + 1)
    every = [(f"{at}[{i}]", element) for i, element in enumerate(elements)]
    return [every[int(index)]] if index else every


def _reply(column: str) -> dict[str, str]:
    return {"output": column}


def _pair(chosen: str = "chosen", rejected: str = "rejected") -> dict[str, str]:
    return {"chosen": chosen, "rejected": rejected}


def _mapped(prompt: str, answers: Mapping[str, str] | None = None, **more: Any) -> Mapped:
    return Mapped(prompt=prompt, answers=answers or {}, **more)


_MIRACL = _mapped("query", _pair("positive_passages[0].text", "negative_passages[0].text"))
TURNS_OF_TEXT = _mapped("text", marks=("<human>:", "<bot>:"))

DATASETS: dict[str, Alias | Mapped] = {
    "Anthropic/hh-rlhf": Alias("hh"),
    "Dahoas/rm-static": Alias("hh"),
    "Dahoas/full-hh-rlhf": Alias("hh"),
    "openai/webgpt_comparisons": Alias("webgpt"),
    "stanfordnlp/SHP": Alias("shp"),
    "lvwerra/stack-exchange-paired": Alias("stack-exchange"),
    "openai/summarize_from_feedback": Alias("summarize"),
    "CarperAI/openai_summarize_tldr": Alias("summarize"),
    "CarperAI/openai_summarize_comparisons": Alias("summarize"),
    "tatsu-lab/alpaca": Alias("alpaca"),
    "yahma/alpaca-cleaned": Alias("alpaca"),
    "JosephusCheung/GuanacoDataset": Alias("alpaca"),
    "BelleGroup/train_1M_CN": Alias("alpaca"),
    "BelleGroup/train_0.5M_CN": Alias("alpaca"),
    "QingyiSi/Alpaca-CoT": Alias("alpaca"),
    "huatuo_med_data/llama_med": Alias("alpaca"),
    "huatuo_med_data/liver_cancer": Alias("alpaca"),
    "InstructionWild/instinwild_en": Alias("alpaca"),
    "InstructionWild/instinwild_ch": Alias("alpaca"),
    "alpaca_chinese/alpaca_data_zh_51k": Alias("alpaca"),
    "alpaca_chinese/trans_chinese_alpaca_data": Alias("alpaca"),
    "OpenAssistant/oasst1": Alias("oasst"),
    "Dahoas/synthetic-instruct-gptj-pairwise": _mapped("prompt", _pair()),
    "yitingxie/rlhf-reward-datasets": _mapped("prompt", _pair(), marks=("Human:", "Assistant:")),
    "OAPrivate": _mapped("prompt", _pair("pos", "neg_replies[]"), history="history"),
    "Cohere/miracl-zh-queries-22-12": _MIRACL,
    "Cohere/miracl-ja-queries-22-12": _MIRACL,
    "wangrui6/Zhihu-KOL": _mapped("INSTRUCTION", _reply("RESPONSE")),
    "Hello-SimpleAI/HC3-Chinese": _mapped("question", {"human": "human_answers[0]"}),
    "mkqa-Chinese": _mapped("queries.zh_cn", _reply("answers.zh_cn[0].text")),
    "mkqa-Japanese": _mapped("queries.ja", _reply("answers.ja[0].text")),
    "lmqg/qg_jaquad": _mapped("question", _reply("sentence")),
    "lmqg/qag_jaquad": _mapped("questions[0]", _reply("paragraph")),
    "databricks/databricks-dolly-15k": _mapped("instruction", _reply("response"), context="context"),
    "mosaicml/dolly_hhrlhf": _mapped("prompt", _reply("response"), verbatim=True),
    "YeungNLP/firefly-train-1.1M": _mapped("input", _reply("target")),
    "fnlp/moss-002-sft-data": _mapped("plain_text", marks=("[Human]:", "[MOSS]:"), ends="<eo[ha]>"),
    "nomic-ai/gpt4all-j-prompt-generations": _mapped("prompt", _reply("response")),
    "laion/OIG": TURNS_OF_TEXT,
}

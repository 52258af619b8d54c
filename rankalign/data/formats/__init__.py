"""Foreign data formats, both ways. One file a family; add one by a file and a line in :data:`FORMATS`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from rankalign.data.records import CandidateSet
from rankalign.registry import Entry, Registry
from rankalign.storage.jsonl import OnError, Row


@dataclass
class Losses:
    """What a writer had to leave out, by reason, so that nothing is dropped in silence."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str, count: int = 1) -> None:
        """Count ``reason`` once more."""
        self.counts[reason] = self.counts.get(reason, 0) + count


class Format(Protocol):
    """A module-level object of each format file."""

    def read(self, rows: Iterable[Row], file: str, on_error: OnError) -> Iterator[CandidateSet]:
        """Records from foreign rows (line number, object). A bad row goes to ``on_error`` and is left out."""
        ...

    def write(self, records: Iterable[CandidateSet], losses: Losses) -> Iterator[dict[str, Any]]:
        """Foreign rows from records; what the format cannot hold is counted in ``losses``."""
        ...


FORMATS = Registry(
    "format",
    {
        "rankalign": Entry(
            "rankalign.data.formats.native:FORMAT", "our own record, one prompt with N responses a line"
        ),
        "rrhf": Entry("rankalign.data.formats.rrhf:FORMAT", "query, responses, scores (RRHF, Wombat)"),
        "trl": Entry("rankalign.data.formats.trl:FORMAT", "prompt, chosen, rejected and TRL's other shapes"),
        "alpaca": Entry("rankalign.data.formats.alpaca:FORMAT", "instruction, input, output (Stanford Alpaca)"),
        "hh": Entry(
            "rankalign.data.formats.hh:FORMAT", "Human / Assistant dialogues (Anthropic HH, rm-static, full-hh-rlhf)"
        ),
        "summarize": Entry(
            "rankalign.data.formats.summarize:FORMAT", "TL;DR posts, comparisons and axes, raw and HF form"
        ),
        "webgpt": Entry("rankalign.data.formats.web:WEBGPT", "openai/webgpt_comparisons"),
        "shp": Entry("rankalign.data.formats.web:SHP_FORMAT", "Stanford Human Preferences"),
        "stack-exchange": Entry("rankalign.data.formats.web:STACK_EXCHANGE", "paired Stack Exchange answers"),
        "gpt4-compare": Entry("rankalign.data.formats.gpt4_compare:FORMAT", "GPT-4-LLM comparisons (Wombat)"),
        "ultrafeedback": Entry("rankalign.data.formats.ultrafeedback:FORMAT", "UltraFeedback, full and binarised"),
        "nemo-rl": Entry("rankalign.data.formats.nemo_rl:FORMAT", "context and ranked completions (NeMo-RL)"),
        "llama-factory": Entry(
            "rankalign.data.formats.llama_factory:FORMAT", "alpaca and sharegpt rows (LLaMA-Factory)"
        ),
        "ms-swift": Entry("rankalign.data.formats.ms_swift:FORMAT", "messages and rejected_response (ms-swift)"),
        "openrlhf": Entry("rankalign.data.formats.openrlhf:FORMAT", "input, output, chosen, rejected (OpenRLHF)"),
        "pro": Entry("rankalign.data.formats.pro:FORMAT", "prefix, suffix, reward (PRO)"),
        "halos": Entry("rankalign.data.formats.halos:FORMAT", "samples and feedback (HALOs)"),
        "alpaca-eval": Entry(
            "rankalign.data.formats.alpaca_eval:FORMAT", "model outputs, annotations, preferences (AlpacaEval)"
        ),
        "fastchat": Entry("rankalign.data.formats.fastchat:FORMAT", "questions, answers, reviews (FastChat)"),
        "minchatgpt": Entry("rankalign.data.formats.minchatgpt:FORMAT", "answers of three policies (minChatGPT)"),
        "arena-hard": Entry("rankalign.data.formats.arena_hard:FORMAT", "questions and model answers (Arena-Hard)"),
        "pku": Entry("rankalign.data.formats.pairs:PKU_FORMAT", "two answers, the better and the safer (PKU-SafeRLHF)"),
        "helpsteer": Entry("rankalign.data.formats.rated:HELPSTEER", "axes of an answer, or pairs (HelpSteer 1, 2, 3)"),
        "nectar": Entry("rankalign.data.formats.candidates:NECTAR", "seven ranked answers a prompt (Nectar)"),
        "arena-battles": Entry("rankalign.data.formats.battles:FORMAT", "two models, a winner (Chatbot Arena, LMSYS)"),
        "beavertails": Entry("rankalign.data.formats.rated:BEAVERTAILS", "an answer, safe or not (BeaverTails)"),
        "distilabel": Entry("rankalign.data.formats.candidates:DISTILABEL", "generations and ratings (distilabel)"),
        "openhermes-preferences": Entry(
            "rankalign.data.formats.candidates:OPENHERMES", "three ranked completions (OpenHermesPreferences)"
        ),
        "prometheus": Entry("rankalign.data.formats.prometheus:FORMAT", "what a judge compared or graded (Prometheus)"),
        "ultrainteract": Entry("rankalign.data.formats.ultrainteract:FORMAT", "pairs of steps (UltraInteract)"),
        "best-of-n": Entry("rankalign.data.formats.candidates:BEST_OF_N", "a prompt, a list of answers, their rewards"),
        "pairs": Entry("rankalign.data.formats.pairs:PAIRS", "two answers in columns, a verdict in words"),
        "prompt-response": Entry(
            "rankalign.data.formats.rated:PROMPT_RESPONSE", "an answer a row, with or without a score (dolly, ...)"
        ),
        "text-score": Entry("rankalign.data.formats.text_score:FORMAT", "whole texts with scores (DSP)"),
        "columns": Entry("rankalign.data.formats.columns:FORMAT", "an answer a column (PandaLM, LLMBar, DSP, ...)"),
        "table": Entry(
            "rankalign.data.formats.table:FORMAT", "rated tables (CSV, TSV, XLSX), told what each column is"
        ),
    },
)

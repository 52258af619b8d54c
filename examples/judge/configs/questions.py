"""Pairs that people have put in order, as questions to a judge in both orders: train.jsonl with the right verdicts,
questions.jsonl without them, heldout.prompts.jsonl of every fourth pair."""

from __future__ import annotations

import sys
from pathlib import Path

from rankalign.data.load import load
from rankalign.data.records import CandidateSet, Response, write
from rankalign.scorers.judge import JudgeScorer

# The very prompt that `kind: judge` would send. Leave hardened at true where answers are not your own.
JUDGE = JudgeScorer("judge", {"model": "default"}, "pairwise", prompt="configs/judge.jsonl", hardened=False)


def questions(record: CandidateSet) -> list[CandidateSet]:
    """A question for each order; ``label`` in its meta is what the people would say."""
    better = max(range(2), key=lambda place: record.responses[place].scores["preference"] or 0)
    return [
        CandidateSet(call.prompt.id, call.prompt.prompt, [], {"label": "AB"[call.shown.index(better)]})
        for call in JUDGE.case(record).calls
    ]


def answered(question: CandidateSet) -> CandidateSet:
    """The question with the verdict of the people."""
    return CandidateSet(question.id, question.prompt, [Response(f"[[{question.meta['label']}]]", "people")])


if not Path("train.jsonl").exists():
    pairs = list(load(sys.argv[1]))
    train = [question for number, pair in enumerate(pairs) if number % 4 != 3 for question in questions(pair)]
    write("heldout.prompts.jsonl", [q for number, pair in enumerate(pairs) if number % 4 == 3 for q in questions(pair)])
    write("questions.jsonl", train)
    write("train.jsonl", map(answered, train))

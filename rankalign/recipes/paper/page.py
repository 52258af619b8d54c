"""The page: tables with intervals, the paper's claims with what came of them, and the facts of the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from rankalign.evaluation.statistics import DRAWS, Array, percentile_interval
from rankalign.evaluation.tables import cell, interval
from rankalign.recipes.paper.claims import Claim, Finding, Resamples, Results, claims
from rankalign.recipes.paper.graders import PREFIX
from rankalign.recipes.paper.settings import TableConfig
from rankalign.storage import manifest
from rankalign.storage.files import write_text
from rankalign.storage.jsonl import dumps, loads

UNEQUAL = 0.1
"""Share by which sampled tokens may differ before the page says so."""

SPENT = {
    "time, s": ("seconds", 1.0),
    "peak, GB": ("peak_bytes", 1e9),
    "models": ("models", 1.0),
    "sampled, k": ("sampled", 1e3),
    "forward, k": ("forward", 1e3),
    "backward, k": ("backward", 1e3),
}
"""What a column shows, and in which unit."""

ABOUT = f"""\
Written by `bash train_scripts/paper_table.sh`; every figure comes from files of one run. Brackets are 95 % intervals of
a bootstrap with {DRAWS:,} draws that resamples seeds and held-out prompts at once; all rows share prompts and seeds, so
the claims below rest on paired differences. Held-out answers are drawn at temperature 1.

* **reward**: mean over answers. **perplexity**: of the answers under the start model, behind their prompts.
  **repetition**: share of an answer's 3-grams of words that stood in it before. **length**: words.
* **KL**: to the start model, nats an answer, estimated on the model's own draws; for best-of-n its upper bound
  log n - (n - 1) / n (Beirami et al. 2024, arXiv:2401.01879).
* **time**: of sampling, scoring and training. **peak**: most resident memory of the process that trained.
  **models**: language models that training holds at once. The reward is a function here, so no row holds a reward
  model; a value head on the policy is not counted as a model.
* **sampled**, **forward**, **backward**: tokens, in thousands. Forward counts sampling with its prompts, reference and
  scoring passes, and training; a prompt that several answers share counts once. Making held-out answers is in no
  column; best-of-n pays there, with n answers where the others need one.

A claim that is not decided says how many prompts or seeds would decide it if the figure itself stays what it is: in
closed form from the variances between seeds, between prompts and of both at once of the paired differences, stretched
to the bootstrap's interval, which is a cautious one.
"""


def write_page(
    path: Path, config: TableConfig, results: Results, units: Mapping[tuple[str, int], Mapping[str, Any]]
) -> list[Claim]:
    """Write the page to ``path``; returns the claims with their verdicts."""
    draws = Resamples(results)
    found = claims(draws)
    titles = {row.name: row.title for row in config.rows}
    parts = [
        "# The RRHF paper's comparison at a small size",
        ABOUT,
        "## Held-out answers",
        grid(["row", "reward", "perplexity", "repetition", "length", "KL"], quality(draws, titles)),
        *graders(config, draws, titles),
        "## What it took, means over seeds",
        grid(
            ["row", "time, s", "peak, GB", "models", "sampled, k", "forward, k", "backward, k"], spent(results, titles)
        ),
        budget(results, titles),
        "## Reward seed by seed, and the training candidates",
        grid(["row", *(f"seed {seed}" for seed in config.seeds), "train mean", "train max"], seeds(draws, titles)),
        "## The paper's claims",
        *(claim_text(claim) for claim in found),
        "## Facts",
        facts(config, list(units.values())),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n\n".join(part.strip() for part in parts) + "\n")
    return found


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def _shown(values: Array) -> str:
    return f"{cell(float(values[0]))} {interval(percentile_interval(values[1:]))}"


def quality(draws: Resamples, titles: Mapping[str, str]) -> list[list[str]]:
    """One line a row: what held-out answers are like, with intervals."""
    return [
        [title, _shown(draws.mean(name, "reward")), _shown(draws.perplexity(name))]
        + [_shown(draws.mean(name, measure)) for measure in ("repetition", "words", "kl")]
        for name, title in titles.items()
    ]


def graders(config: TableConfig, draws: Resamples, titles: Mapping[str, str]) -> list[str]:
    """The part on graders: each row's mean, and how far it is above the start model's, prompt by prompt."""
    if not config.graders:
        return []
    start = next((row.name for row in config.rows if row.kind == "start"), None)
    columns, lines = ["row"], [[title] for title in titles.values()]
    for grader in config.graders:
        columns += [grader.name, f"{grader.name}, less the start model"][: 2 if start else 1]
        for name, line in zip(titles, lines, strict=True):
            values = draws.mean(name, PREFIX + grader.name)
            line.append(_shown(values))
            if start:
                line.append("–" if name == start else _shown(values - draws.mean(start, PREFIX + grader.name)))
    about = "The same answers by scorers that nothing was trained on: is what the reward asks for better by them, too?"
    return ["## By other graders", about, grid(columns, lines)]


def spent(results: Results, titles: Mapping[str, str]) -> list[list[str]]:
    """One line a row: time, memory and tokens; a dash where nothing was trained or it is not known."""
    return [
        [title, *(cell(float(results.costs[name][key].mean()) / unit or None) for key, unit in SPENT.values())]
        for name, title in titles.items()
    ]


def budget(results: Results, titles: Mapping[str, str]) -> str:
    """A sentence on whose budget of sampled tokens differs from that of RRHF on the model's own draws."""
    sampled = {name: float(results.costs[name]["sampled"].mean()) for name in titles}
    base = sampled.get("rrhf_d", 0.0)
    other = [name for name, value in sampled.items() if value and base and abs(value / base - 1) > UNEQUAL]
    if not base:
        return "The budgets of sampled tokens are not compared: the table has no row `rrhf_d`."
    if not other:
        return f"All rows that learn from sampled answers had the same budget of them, within {UNEQUAL:.0%}."
    shown = ", ".join(f"{titles[name]} {sampled[name] / base:.2f}" for name in other)
    return f"Budgets of sampled tokens are not all equal; as multiples of that of {titles['rrhf_d']}: {shown}."


def seeds(draws: Resamples, titles: Mapping[str, str]) -> list[list[str]]:
    """One line a row: mean reward of each seed, and mean and maximum of the training candidates, measured alike."""
    lines = []
    for name, title in titles.items():
        pool = draws.results.pool.get(name, {})
        means = [cell(float(value)) for value in draws.results.held[name]["reward"].mean(axis=1)]
        lines.append([title, *means, *(_shown(draws.pool_mean(name, k)) if pool else "–" for k in ("mean", "max"))])
    return lines


def claim_text(claim: Claim) -> str:
    """A claim with its verdict and the findings under it."""
    lines = [f"**{claim.text}** ({claim.source}): **{claim.verdict}**."]
    if claim.missing:
        lines.append(f"The table lacks the rows it needs: {', '.join(claim.missing)}.")
    if len(claim.findings) > 1:
        lines.append("All of these have to hold:" if claim.every else "Any of these is enough:")
    findings = [f"* {f.text}: {cell(f.value)} {interval(f.interval)}, {f.verdict}{_more(f)}" for f in claim.findings]
    return "\n".join([" ".join(lines), "", *findings]).strip()


def _more(found: Finding) -> str:
    """What would decide a finding, where it is open."""
    return f"; {found.needed} would decide it if the figure stays" if found.needed else ""


def facts(config: TableConfig, units: Sequence[Mapping[str, Any]]) -> str:
    """Versions, processors, dates, time and settings, from the manifests of the units."""
    folder = Path(config.output)
    found = [manifest.read(folder / f"seed-{seed}" / row.name) for seed in config.seeds for row in config.rows]
    kept = [one for one in found if one]
    versions = sorted({dumps(one["versions"]) for one in kept})
    machines = sorted({f"{one['machine']['cpus']} processors" for one in kept})
    days = sorted({one["date"] for one in kept})
    hours = sum(one["cost"]["seconds"] for one in kept) / 3600
    settings = {
        key: value for key, value in spoken(config).items() if key not in ("output", "page", "jobs", "overwrite")
    }
    lines = [f"* {', '.join(f'{k} {v}' for k, v in loads(one).items())}" for one in versions]
    threads = sorted({unit["threads"] for unit in units if "threads" in unit})  # a table begun before knows none
    each = f"; a row takes {' or '.join(map(str, threads))} of them" if threads else ""
    each += f", {config.jobs} seeds at a time" if config.jobs > 1 else ""
    lines += [f"* {one}{each}" for one in machines]
    lines += [f"* {' to '.join(dict.fromkeys((days[0], days[-1])))}; seeds {', '.join(map(str, config.seeds))}"]
    lines += [f"* {hours:.1f} hours of sampling, scoring and training, what rows share counted in each of them"]
    return "\n".join([*lines, "", "Settings:", "", "```yaml", yaml.safe_dump(settings, sort_keys=False).strip(), "```"])


def spoken(settings: Any) -> Any:
    """Settings as plain values, without those that have their default."""
    if is_dataclass(settings):
        shown = [one for one in fields(settings) if getattr(settings, one.name) != _default(one)]
        return {one.name: spoken(getattr(settings, one.name)) for one in shown}
    if isinstance(settings, list):
        return [spoken(one) for one in settings]
    return loads(dumps(settings))


def _default(one: Field[Any]) -> Any:
    return one.default_factory() if one.default_factory is not MISSING else one.default

"""The tables of a benchmark: scores, cost, paired differences to a baseline, and what the chains
say rightly.

They are made of one record (`benchmark.run` makes it), with every picture's numbers in the order of
its items:

    {"set", "baseline", "note", "ids": [...], "groups": [...], "skipped": {name: reason}, "remarks":
      [...],
     "methods": {name: {"scores": {metric: [...]}, "said": {fact: [...]}, "seconds", "megapixels",
       "megabytes", "fid"?}}}

Intervals resample photos, not pictures: one photo under three degradations is one draw, and its
mean counts once.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from realsr_r1.common import atomic
from realsr_r1.evaluation import metrics
from realsr_r1.stats import clustered

FEWEST = 5  # photos below which a bootstrap interval says too little for a mark


def write(path: Path, text: str) -> None:
    """Write a text file in one go: a reader sees the old one or the new one, never half."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def grouped(values: Sequence[float | None], groups: Sequence[str]) -> np.ndarray:
    """The mean of each group, pictures without a number left out: the items of one photo count as
    one."""
    sums: dict[str, list[float]] = {}
    for v, g in zip(values, groups, strict=True):
        if v is not None:
            sums.setdefault(g, []).append(v)
    return np.array([np.mean(v) for v in sums.values()])


def difference(values: Sequence[float | None], base: Sequence[float | None]) -> list[float | None]:
    """Picture by picture, None where either has no number."""
    return [None if a is None or b is None else a - b for a, b in zip(values, base, strict=True)]


def mark(differences: np.ndarray, higher: bool) -> str:
    """▲ (better than the baseline) or ▼ (worse) if the 95% interval of the mean is clear of zero,
    given FEWEST photos; else nothing."""
    if len(differences) < FEWEST:
        return ""
    _, low, high = bootstrap(differences)
    return "" if low <= 0 <= high else " ▲" if (low > 0) == higher else " ▼"


def bootstrap(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of one value per photo (n,) and its 95% interval; of a single photo the value itself."""
    if len(values) == 1:
        return (float(values[0]),) * 3
    found = clustered(values, range(len(values)))
    return found.mean, found.low, found.high


def cell(values: np.ndarray, digits: int = 3, percent: bool = False) -> str:
    """Mean and interval for a table, as in 0.123 [0.100, 0.150]."""
    mean, low, high = bootstrap(values)
    form = ".1%" if percent else f".{digits}f"
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def row(*cells: str, head: bool = False) -> list[str]:
    """A row of a Markdown table, with the line below it if it is the head."""
    return [f"| {' | '.join(cells)} |", *(["|---" * len(cells) + "|"] if head else [])]


def tables(record: dict) -> list[str]:
    """Markdown: scores and cost of each method, differences to the baseline, and what the chains
    say rightly."""
    methods, groups, base = record["methods"], record["groups"], record["baseline"]
    names = list(next(iter(methods.values()))["scores"])
    fid = ["fid"] * any("fid" in m for m in methods.values())
    digits = {
        k: 3 if np.abs(grouped(m["scores"][k], groups)).max(initial=0) < 2 else 2
        for m in methods.values()
        for k in names
    }
    heads = [f"{k} {metrics.arrow(k)}" for k in names]
    lines = row(
        "method",
        *heads,
        *(f"{k} {metrics.arrow(k)}" for k in fid),
        "s / megapixel",
        "peak MB",
        head=True,
    )
    for name, m in methods.items():
        cells = [
            cell(v, digits[k]) if len(v := grouped(m["scores"][k], groups)) else "–" for k in names
        ]
        cells += [f"{m['fid']:.1f}" for _ in fid] + [
            f"{m['seconds'] / m['megapixels']:.2f}",
            f"{m['megabytes']:.0f}",
        ]
        lines += row(name, *cells)
    if base in methods and len(methods) > 1:
        lines += ["", *row(f"minus {base}, paired", *heads, head=True)]
        for name in (m for m in methods if m != base):
            diffs = {
                k: grouped(
                    difference(methods[name]["scores"][k], methods[base]["scores"][k]), groups
                )
                for k in names
            }
            marks = {k: mark(d, metrics.METRICS[k].higher) for k, d in diffs.items()}
            lines += row(
                name, *(cell(d, digits[k]) + marks[k] if len(d) else "–" for k, d in diffs.items())
            )
        lines += [
            "",
            f"▲ better, ▼ worse than {base}, where the interval is clear of zero (given "
            f"{FEWEST} photos or more).",
        ]
    chains = {name: m["said"] for name, m in methods.items() if m["said"]}
    if chains:
        facts = list(next(iter(chains.values())))
        lines += ["", *row("the chain says rightly", *facts, head=True)]
        for name, s in chains.items():
            lines += row(name, *(cell(grouped(v, groups), percent=True) for v in s.values()))
    return [
        *lines,
        "",
        *(f"{name}: {why}." for name, why in record["skipped"].items()),
        *record["remarks"],
        record["note"],
        "",
    ]


def save(record: dict, out: Path, name: str) -> None:
    """Write name.md, name.csv (means, intervals, paired differences) and name.json (every picture's
    numbers)."""
    write(out / f"{name}.md", "\n".join(tables(record)))
    write(out / f"{name}.json", json.dumps(record))
    methods, groups, base = record["methods"], record["groups"], record["baseline"]
    with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as f:
        w = csv.writer(f)
        w.writerow(
            [
                "method",
                "measure",
                "mean",
                "low",
                "high",
                "difference",
                "difference_low",
                "difference_high",
            ]
        )
        for method, m in methods.items():
            for k, v in (m["scores"] | m["said"]).items():
                other = (
                    (methods[base]["scores"] | methods[base]["said"]).get(k)
                    if base in methods and method != base
                    else None
                )
                both = [
                    grouped(x, groups)
                    for x in (v, difference(v, other) if other else [None] * len(v))
                ]
                w.writerow(
                    [
                        method,
                        k,
                        *(c for x in both for c in (bootstrap(x) if len(x) else ["", "", ""])),
                    ]
                )
            cost = {
                "seconds_per_megapixel": m["seconds"] / m["megapixels"],
                "peak_megabytes": m["megabytes"],
            }
            w.writerows(
                [method, k, v]
                for k, v in (cost | ({"fid": m["fid"]} if "fid" in m else {})).items()
            )

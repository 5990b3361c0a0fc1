"""The tables of a benchmark: scores, cost, paired differences to a baseline, and what the chains
say rightly.

They are made of one record (`benchmark.run` makes it), with every picture's numbers in the order of
its items:

    {"set", "baseline", "note", "ids": [...], "groups": [...], "skipped": {name: reason}, "remarks":
      [...],
     "methods": {name: {"scores": {metric: [...]}, "said": {fact: [...]}, "seconds", "megapixels",
       "megabytes", "timed", "fid"?}}}

Intervals resample groups, not pictures: one photo under three degradations is one draw, and so are
all flowers of one photographer.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from realsr_r1.common import write_text
from realsr_r1.evaluation import metrics
from realsr_r1.stats import Interval, clustered

FEWEST = 5  # groups below which a bootstrap interval says too little for a mark
Values = Sequence[float | None]


def mean(values: Values, groups: Sequence[str]) -> Interval | None:
    """The mean of the pictures that have a number and its interval over groups, which of a single
    group is the mean itself; None if there is no number."""
    known = [(v, g) for v, g in zip(values, groups, strict=True) if v is not None]
    if not known:
        return None
    found = clustered(*zip(*known, strict=True))
    alone = len({g for _, g in known}) == 1
    return Interval(found.mean, found.mean, found.mean) if alone else found


def difference(values: Values, base: Values) -> list[float | None]:
    """Picture by picture, None where either has no number."""
    return [None if a is None or b is None else a - b for a, b in zip(values, base, strict=True)]


def mark(differences: Values, groups: Sequence[str], higher: bool) -> str:
    """▲ (better than the baseline) or ▼ (worse) if the 95% interval of the mean is clear of zero,
    given FEWEST groups; else nothing."""
    if len({g for v, g in zip(differences, groups, strict=True) if v is not None}) < FEWEST:
        return ""
    found = mean(differences, groups)
    return "" if not found.clear_of_zero else " ▲" if (found.low > 0) == higher else " ▼"


def cell(found: Interval | None, form: str = ".3f") -> str:
    """Mean and interval for a table, as in 0.123 [0.100, 0.150]."""
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]" if found else "–"


def row(*cells: str, head: bool = False) -> list[str]:
    """A row of a Markdown table, with the line below it if it is the head."""
    return [f"| {' | '.join(cells)} |", *(["|---" * len(cells) + "|"] if head else [])]


def form_of(metric: str, methods: dict[str, dict]) -> str:
    """Three digits for a metric whose numbers are small in all methods, else two."""
    numbers = [abs(v) for m in methods.values() for v in m["scores"][metric] if v is not None]
    return ".3f" if max(numbers, default=0.0) < 2 else ".2f"


def scores(record: dict, forms: dict[str, str]) -> list[str]:
    """Each method's scores and cost."""
    methods, groups = record["methods"], record["groups"]
    fid = ["fid"] * any("fid" in m for m in methods.values())
    heads = [f"{k} {metrics.arrow(k)}" for k in (*forms, *fid)]
    lines = row("method", *heads, "s / megapixel", "peak MB", head=True)
    for name, m in methods.items():
        cells = [cell(mean(m["scores"][k], groups), form) for k, form in forms.items()]
        cells += [f"{m['fid']:.1f}" for _ in fid]
        cells += [f"{m['seconds'] / m['megapixels']:.2f}", f"{m['megabytes']:.0f}"]
        lines += row(name, *cells)
    return lines


def differences(record: dict, forms: dict[str, str]) -> list[str]:
    """Each method minus the baseline, pairwise; nothing where there is none."""
    methods, groups, base = record["methods"], record["groups"], record["baseline"]
    if base not in methods or len(methods) < 2:
        return []
    heads = [f"{k} {metrics.arrow(k)}" for k in forms]
    lines = ["", *row(f"minus {base}, paired", *heads, head=True)]
    for name in (m for m in methods if m != base):
        cells = []
        for k, form in forms.items():
            d = difference(methods[name]["scores"][k], methods[base]["scores"][k])
            found = cell(mean(d, groups), form)
            cells.append(found + mark(d, groups, metrics.METRICS[k].higher))
        lines += row(name, *cells)
    what = f"where the interval is clear of zero (given {FEWEST} groups or more)"
    return [*lines, "", f"▲ better, ▼ worse than {base}, {what}."]


def facts(record: dict) -> list[str]:
    """What the chains say rightly, in percent; nothing where no method has chains."""
    chains = {name: m["said"] for name, m in record["methods"].items() if m["said"]}
    if not chains:
        return []
    lines = ["", *row("the chain says rightly", *next(iter(chains.values())), head=True)]
    for name, said in chains.items():
        lines += row(name, *(cell(mean(v, record["groups"]), ".1%") for v in said.values()))
    return lines


def tables(record: dict) -> list[str]:
    """Markdown: scores and cost of each method, differences to the baseline, and what the chains
    say rightly."""
    methods = record["methods"]
    forms = {k: form_of(k, methods) for k in next(iter(methods.values()))["scores"]}
    lines = scores(record, forms) + differences(record, forms) + facts(record)
    skipped = [f"{name}: {why}." for name, why in record["skipped"].items()]
    return [*lines, "", *skipped, *record["remarks"], record["note"], ""]


def rows(record: dict) -> list[list]:
    """The rows of the CSV: method, measure, mean and interval, the same of the difference."""
    methods, groups, base = record["methods"], record["groups"], record["baseline"]
    out, numbers = [], {name: m["scores"] | m["said"] for name, m in methods.items()}
    for name, m in methods.items():
        for k, v in numbers[name].items():
            other = numbers[base].get(k) if base in methods and name != base else None
            found = mean(v, groups), mean(difference(v, other), groups) if other else None
            both = [(i.mean, i.low, i.high) if i else ("", "", "") for i in found]
            out.append([name, k, *both[0], *both[1]])
        out.append([name, "seconds_per_megapixel", m["seconds"] / m["megapixels"]])
        out.append([name, "peak_megabytes", m["megabytes"]])
        out += [[name, "fid", m["fid"]]] if "fid" in m else []
    return out


def save(record: dict, out: Path, name: str) -> None:
    """Write name.md, name.csv (means, intervals, paired differences) and name.json (every picture's
    numbers)."""
    write_text(out / f"{name}.md", "\n".join(tables(record)))
    write_text(out / f"{name}.json", json.dumps(record))
    text, three = io.StringIO(newline=""), ["", "_low", "_high"]
    heads = ["mean", "low", "high", *(f"difference{x}" for x in three)]
    csv.writer(text, lineterminator="\n").writerows([["method", "measure", *heads], *rows(record)])
    write_text(out / f"{name}.csv", text.getvalue())

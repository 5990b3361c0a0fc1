"""What the benchmark writes down: every row at once to a CSV file, and from it the table and the
figure.

Rows are appended as they are measured, so a run that is stopped loses nothing, and one section can
be measured again alone: the table shows the newest row of each name, with its date.
"""

import csv
import math
import os
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from realsr_r1.common import write_text
from realsr_r1.files.writable import append_row

FIELDS = ("section", "what", "result", "series", "x", "seconds", "date", "machine")
# What grows, on which axis, and how it is drawn: Okabe and Ito's colors, and a marker of its own
# for each.
SERIES = {
    "restore": ("restore a photo", "LR pixels", "#0072B2", "o"),
    "realesrgan": ("Real-ESRGAN x4plus", "LR pixels", "#D55E00", "s"),
    "group": ("sample a group", "chains in the group", "#009E73", "^"),
}


def machine() -> str:
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def exponent(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """(k, c) of the least-squares fit y = c·x^k in logarithms. Raises ValueError for fewer than two
    different x."""
    if len(set(xs)) < 2:
        raise ValueError(f"an exponent needs at least two sizes, got {sorted(set(xs))}")
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mu, mv = sum(u) / len(u), sum(v) / len(v)
    k = sum((a - mu) * (b - mv) for a, b in zip(u, v, strict=True)) / sum((a - mu) ** 2 for a in u)
    return k, math.exp(mv - k * mu)


@dataclass
class Record:
    """The rows in `out`/bench.csv, their table bench.md and their figure bench.webp."""

    out: Path
    section: str = ""
    rows: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self):
        self.out.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8-sig") as f:
                self.rows = list(csv.DictReader(f))

    @property
    def path(self) -> Path:
        return self.out / "bench.csv"

    def row(
        self,
        what: str,
        result: str,
        series: str = "",
        x: float | None = None,
        seconds: float | None = None,
    ) -> None:
        """Note one row, print it, and write the table anew. `series`, `x` and `seconds` put a point
        into the figure."""
        number = lambda v: "" if v is None else f"{v:.6g}"  # noqa: E731
        values = (
            self.section,
            what,
            result,
            series,
            number(x),
            number(seconds),
            f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
            machine(),
        )
        new = dict(zip(FIELDS, values, strict=True))
        append_row(self.path, new)
        self.rows.append(new)
        print(f"| {what} | {result} |", flush=True)
        self.write_table()

    def newest(self) -> list[dict[str, str]]:
        """The last row of each name, sections and names in the order in which they first came."""
        last = {(r["section"], r["what"]): r for r in self.rows}
        sections = list(dict.fromkeys(r["section"] for r in self.rows))
        return sorted(last.values(), key=lambda r: sections.index(r["section"]))

    def points(self, series: str) -> tuple[list[float], list[float]]:
        """The newest points of a series, by size."""
        points = sorted(
            (float(r["x"]), float(r["seconds"])) for r in self.newest() if r["series"] == series
        )
        return [x for x, _ in points], [y for _, y in points]

    def write_table(self) -> None:
        lines = [f"`make bench` ({machine()}; ratios are of runs side by side).\n"]
        for section in dict.fromkeys(r["section"] for r in self.newest()):
            lines.append(f"### {section}\n\n| what | result | measured |\n|---|---|---|")
            lines += [
                f"| {r['what']} | {r['result']} | {r['date'][:10]} |"
                for r in self.newest()
                if r["section"] == section
            ]
            lines.append("")
        if (self.out / "bench.webp").exists():
            lines.append(
                "![How the cost grows, in log-log scale, with fitted exponents](bench.webp)\n"
            )
        if (self.out / "fuzz.md").exists():
            lines.append("What damaged files do to the reader of pictures: [fuzz.md](fuzz.md).\n")
        write_text(self.out / "bench.md", "\n".join(lines))

    def write_figure(self) -> dict[str, float]:
        """Draw every series of at least two points, and return their exponents."""
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
        from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

        found = {s: p for s in SERIES if len((p := self.points(s))[0]) > 1}
        axes_of = list(dict.fromkeys(SERIES[s][1] for s in found))
        if not found:
            return {}
        figure, panels = plt.subplots(
            1, len(axes_of), figsize=(4.2 * len(axes_of), 3.4), squeeze=False, layout="constrained"
        )
        exponents = {}
        for series, (xs, ys) in found.items():
            name, axis, color, marker = SERIES[series]
            exponents[series], c = exponent(xs, ys)
            panel = panels[0][axes_of.index(axis)]
            panel.loglog(
                xs, ys, marker, color=color, label=f"{name}: exponent {exponents[series]:.2f}"
            )
            panel.loglog(
                xs, [c * x ** exponents[series] for x in xs], "--", color=color, linewidth=1
            )
            panel.set(xlabel=axis, ylabel="seconds")
            for ruler, marks in (
                (panel.xaxis, FixedLocator(xs)),
                (panel.yaxis, LogLocator(subs=(1, 2, 5))),
            ):
                ruler.set_major_locator(marks)
                ruler.set_major_formatter(lambda v, _: f"{v:,g}")
                ruler.set_minor_locator(NullLocator())
            panel.legend(fontsize=8)
            panel.grid(alpha=0.3)
        part = self.out / "bench.part.webp"
        figure.savefig(part, dpi=110)
        plt.close(figure)
        part.replace(self.out / "bench.webp")
        return exponents


def side_by_side(contestants: dict, repeats: int = 3) -> dict[str, float]:
    """Seconds of each function: one run to warm up, then rounds in turn, so that a busy spell hits
    all; the medians."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(repeats + 1):
        for name, function in contestants.items():
            start = time.perf_counter()
            function()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}

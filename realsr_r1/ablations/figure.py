"""What the ablations found: one figure a question and one Markdown table, from the runs that are
there.

    python -m realsr_r1.first ablate figure

Differences are paired by scene (and by seed where the baseline has seeds); their 95% intervals come
from a bootstrap that resamples seeds and scenes alike. With three seeds that says little about
other seeds: read an interval as the least doubt there is.
"""

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from realsr_r1.ablations.grpo import GRPO, HACK, Store
from realsr_r1.ablations.sft import LAYOUTS, SAMPLINGS, TEXTS
from realsr_r1.evaluation.policies import HIGHER

# Okabe and Ito's palette, which most colour-blind readers can tell apart.
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


@dataclass(frozen=True)
class Question:
    """A figure: variants of one folder of runs, each as its difference to `base`; `base` itself to
    `first` (if given)."""

    title: str
    runs: str  # folder of the runs
    variants: tuple[str, ...]
    base: str
    measures: tuple[str, ...]
    first: str | None = None


REWARD_MEASURES = ("total reward", "degradation", "understanding", "generation", "LPIPS", "FSIM")
PICTURE_MEASURES = ("LPIPS", "PSNR", "FSIM")
QUESTIONS = {
    "rewards": Question(
        "each reward removed",
        "grpo",
        ("no-format", "no-degradation", "no-understanding", "no-generation"),
        "all",
        REWARD_MEASURES,
        "policy-sft",
    ),
    "kl": Question(
        "the KL to the SFT policy", "grpo", ("no-kl",), "all", REWARD_MEASURES, "policy-sft"
    ),
    "group": Question(
        "group size, equal chains a step",
        "grpo",
        ("group-2", "group-4", "group-16"),
        "all",
        REWARD_MEASURES,
        "policy-sft",
    ),
    "text_in_rollouts": Question(
        "greedy text in rollouts", "grpo", ("greedy-text",), "all", REWARD_MEASURES, "policy-sft"
    ),
    "hack": Question(
        "rewards gamed, and remedies", "hack", tuple(HACK), "policy-sft", REWARD_MEASURES
    ),
    "layout": Question("layout of the chain", "sft", tuple(LAYOUTS)[1:], "chain", PICTURE_MEASURES),
    "told_text": Question("text that is told", "text", tuple(TEXTS)[1:], "own", PICTURE_MEASURES),
    "sampling": Question("sampling", "sampling", tuple(SAMPLINGS)[1:], "default", PICTURE_MEASURES),
}


def crossed_bootstrap(
    values: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of (seeds, scenes) values and its 95% percentile interval: each resample draws seeds and
    scenes, both with replacement."""
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 2 or v.size == 0:
        raise ValueError(f"crossed_bootstrap needs a table of seeds by scenes, got shape {v.shape}")
    rng = np.random.default_rng(seed)
    weights = [
        rng.multinomial(n, np.full(n, 1 / n), resamples) / n for n in v.shape
    ]  # how often each seed and each scene is drawn
    means = np.einsum("rs,rn,sn->r", *weights, v)
    return float(v.mean()), *(float(x) for x in np.percentile(means, [2.5, 97.5]))


def runs_of(out: Path, folder: str, variant: str) -> dict[int, dict[str, list[float]]]:
    """{seed: scores by scene} of a variant's finished runs."""
    found = {}
    for path in (out / folder).glob(f"{variant}_*.scores.json"):
        name, _, seed = path.name.removesuffix(".scores.json").rpartition("_")
        if name == variant:
            found[int(seed)] = json.loads(path.read_text())["scores"]
    return dict(sorted(found.items()))


def difference(runs: dict[int, dict], base: dict[int, dict], measure: str) -> np.ndarray | None:
    """(seeds, scenes): each run minus the baseline's run of the same seed, or minus its only run.
    None where nothing can be paired.

    Raises ValueError if runs were scored on different numbers of scenes.
    """
    only = next(iter(base.values())) if len(base) == 1 else None
    rows = []
    for seed, scores in runs.items():
        against = base.get(seed, only)
        if against is None or measure not in scores or measure not in against:
            continue
        if len(scores[measure]) != len(against[measure]):
            raise ValueError(
                f"runs were scored on {len(scores[measure])} and {len(against[measure])} "
                f"scenes: run the ablations again with one -n"
            )
        rows.append(np.array(scores[measure]) - np.array(against[measure]))
    if len({len(r) for r in rows}) > 1:
        raise ValueError(
            "runs of one variant were scored on different numbers of scenes: run the ablations "
            "again with one -n"
        )
    return np.stack(rows) if rows else None


def effects(
    out: Path, question: Question
) -> list[tuple[str, str, int, dict[str, tuple[float, float, float]]]]:
    """Rows (variant, baseline, seeds, {measure: mean, low, high of the difference}) of a question;
    variants without runs are left out, and the baseline's own row where it would stand alone."""
    pairs = [(question.base, question.first)] if question.first else []
    rows = []
    for variant, base in [*pairs, *((v, question.base) for v in question.variants)]:
        runs, against, found, seeds = (
            runs_of(out, question.runs, variant),
            runs_of(out, question.runs, base),
            {},
            0,
        )
        for measure in question.measures:
            d = difference(runs, against, measure)
            if d is not None:
                found[measure], seeds = crossed_bootstrap(d), len(d)
        if found:
            rows.append((variant, base, seeds, found))
    return rows if any(base == question.base for _, base, *_ in rows) else []


def table(rows: list, question: Question) -> list[str]:
    """Markdown of one question's rows; bold where the interval is clear of zero."""
    arrows = [f"{m} {'↑' if HIGHER.get(m, True) else '↓'}" for m in question.measures]
    lines = [
        f"| {question.title} | seeds | {' | '.join(arrows)} |",
        "|---" * (2 + len(arrows)) + "|",
    ]
    for variant, base, seeds, found in rows:
        cells = []
        for m in question.measures:
            mean, low, high = found.get(m, (np.nan,) * 3)
            text = "" if np.isnan(mean) else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            cells.append(f"**{text}**" if low > 0 or high < 0 else text)
        lines.append(f"| {variant} - {base} | {seeds} | {' | '.join(cells)} |")
    return lines


def logged(out: Path, folder: str, variant: str, column: str) -> list[float]:
    """The mean of a column of the training log for each seed of a variant; runs without it are left
    out."""
    found = []
    for seed in runs_of(out, folder, variant):
        path = Store(out, folder).path(variant, seed, ".csv")
        with path.open() as f:
            values = [float(r[column]) for r in csv.DictReader(f) if r.get(column)]
        found += [sum(values) / len(values)] if values else []
    return found


def dead_rewards(out: Path) -> list[str]:
    """Markdown: the share of groups in which a reward had no spread, sampled against greedy text,
    mean over seeds (all steps)."""
    lines = [
        "| share of groups without spread | degradation | understanding | generation |",
        "|---|---|---|---|",
    ]
    for variant in ("all", "greedy-text"):
        shares = [
            logged(out, "grpo", variant, f"zero_spread/{r}_reward")
            for r in ("degradation", "understanding", "generation")
        ]
        if all(shares):
            lines.append(f"| {variant} | {' | '.join(f'{sum(s) / len(s):.0%}' for s in shares)} |")
    return lines if len(lines) > 2 else []


def band(axis, steps: list[int], values: list[list[float]], colour: str, style, label: str) -> None:
    """A line at the mean of each step's values (one a seed), in a band from the lowest to the
    highest."""
    axis.plot(steps, [np.mean(v) for v in values], linestyle=style, color=colour, label=label)
    axis.fill_between(
        steps,
        [min(v) for v in values],
        [max(v) for v in values],
        color=colour,
        alpha=0.15,
        linewidth=0,
    )


def keep(path: Path, rows: list[dict]) -> None:
    """The numbers behind a figure as CSV, beside it."""
    with path.with_suffix(".csv").open("w", newline="") as f:
        writer = csv.DictWriter(
            f, list(dict.fromkeys(k for r in rows for k in r)), lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)


def save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, pil_kwargs={"quality": 85})


def forest(rows: list, question: Question, path: Path) -> None:
    """A panel for each measure: the differences as points with intervals, zero as a line; an arrow
    says which way is better."""
    from matplotlib.figure import Figure

    n = len(question.measures)
    figure = Figure(figsize=(1.2 + 1.9 * n, 1.1 + 0.3 * len(rows)))
    axes = figure.subplots(1, n, sharey=True, squeeze=False)[0]
    for axis, measure in zip(axes, question.measures, strict=True):
        axis.axvline(0, color="0.6", linewidth=1)
        for y, (_, base, _, found) in enumerate(rows):
            if measure in found:
                mean, low, high = found[measure]
                colour = COLOURS[0] if base == question.base else COLOURS[1]
                # A percentile interval of few seeds may leave the mean out; bars have no negative
                # length.
                axis.errorbar(
                    mean,
                    y,
                    xerr=[[max(0, mean - low)], [max(0, high - mean)]],
                    fmt="o",
                    markersize=4,
                    color=colour,
                    capsize=2,
                )
        axis.set_title(
            f"{measure} ({'more' if HIGHER.get(measure, True) else 'less'} is better)", fontsize=7
        )
        axis.tick_params(labelsize=7)
    axes[0].set_yticks(range(len(rows)), [f"{v} - {b}" for v, b, *_ in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    save(figure, path)


CURVES = {
    "nano": "nano expert (rewarded above)",
    "piqe": "PIQE as an expert",
    "LPIPS": "LPIPS (less is better)",
    "FSIM": "FSIM",
    "recall": "share of tags named",
    "f1": "F1 of things named",
    "words": "words a rough text",
    "things": "different things named",
}


def curves_of(out: Path) -> dict[str, dict[int, dict[str, list[float]]]]:
    """{variant: {step: {measure: a value for each seed}}} of the hacking runs' curves."""
    found: dict = {}
    for path in sorted((out / "hack").glob("*.curve.csv")):
        variant = path.name.removesuffix(".curve.csv").rpartition("_")[0]
        with path.open() as f:
            for row in csv.DictReader(f):
                at = found.setdefault(variant, {}).setdefault(
                    int(row["step"]), {}
                )  # each seed appends its values
                for m in CURVES:
                    at.setdefault(m, []).append(float(row[m]))
    return found


TRAINED = {
    **{
        f"rewards/{r}_reward/mean": f"{r}, mean reward"
        for r in ("degradation", "understanding", "generation")
    },
    "kl": "KL to policy-sft",
    **{
        f"zero_spread/{r}_reward": f"{r}, groups without spread"
        for r in ("degradation", "understanding", "generation")
    },
    "entropy": "entropy of a word (nats)",
}


def training_curves(out: Path, path: Path) -> bool:
    """Training logs of the runs on rewards: above the rewards, below the share of groups in which
    each has no spread. All their numbers go to the CSV."""
    from matplotlib.figure import Figure

    logs: dict[str, list[list[dict]]] = {}
    rows = []
    for variant in GRPO:
        for seed in runs_of(out, "grpo", variant):
            with Store(out, "grpo").path(variant, seed, ".csv").open() as f:
                steps = [r for r in csv.DictReader(f) if r.get("reward")]
            rows += [
                {"variant": variant, "seed": seed, "step": i, **{k: r.get(k) for k in TRAINED}}
                for i, r in enumerate(steps, 1)
            ]
            if variant in ("all", "no-kl", "no-generation", "greedy-text"):
                logs.setdefault(variant, []).append(steps)
    if not logs:
        return False
    keep(path, rows)
    figure = Figure(figsize=(11, 5))
    for axis, (column, title) in zip(figure.subplots(2, 4).flat, TRAINED.items(), strict=True):
        for colour, style, (variant, runs) in zip(COLOURS, STYLES, logs.items(), strict=False):
            values = [
                [float(r[column]) for r in step if r.get(column)]
                for step in zip(*runs, strict=False)
            ]
            if values and all(values):
                band(axis, list(range(1, len(values) + 1)), values, colour, style, variant)
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("step", fontsize=7)
        axis.tick_params(labelsize=7)
    figure.axes[0].legend(fontsize=6)
    save(figure, path)
    return True


def hack_curves(out: Path, path: Path) -> bool:
    """Two rows of panels, runs on pictures above and on text below; lines are means over seeds,
    bands from the lowest to the highest."""
    from matplotlib.figure import Figure

    found = curves_of(out)
    if not found:
        return False
    means = lambda at: {m: round(float(np.mean(v)), 4) for m, v in at.items()}  # noqa: E731
    keep(
        path,
        [
            {"variant": v, "step": step, **means(at)}
            for v, steps in found.items()
            for step, at in sorted(steps.items())
        ],
    )
    names = tuple(CURVES)
    halves = [
        (names[:4], [v for v in HACK if not HACK[v].text_only]),
        (names[4:], [v for v in HACK if HACK[v].text_only or v == "mix"]),
    ]
    figure = Figure(figsize=(11, 5))
    for axes, (measures, variants) in zip(figure.subplots(2, 4), halves, strict=True):
        for axis, measure in zip(axes, measures, strict=True):
            for colour, style, variant in zip(
                COLOURS, STYLES, [v for v in variants if v in found], strict=False
            ):
                steps = sorted(found[variant])
                band(
                    axis, steps, [found[variant][s][measure] for s in steps], colour, style, variant
                )
            axis.set_title(CURVES[measure], fontsize=8)
            axis.set_xlabel("step", fontsize=7)
            axis.tick_params(labelsize=7)
        if axes[0].lines:
            axes[0].legend(fontsize=6)
    save(figure, path)
    return True


def hack_pictures(out: Path, path: Path, seed: int = 0) -> bool:
    """The fixed group at the first and the last sheet of each run on pictures: LR, HR, then eight
    final images a row."""
    rows = []
    for variant in (v for v in HACK if not HACK[v].text_only):
        sheets = sorted((out / "hack").glob(f"{variant}_{seed}_[0-9][0-9][0-9][0-9].png"))
        for sheet, name in [(p, "policy-sft") for p in sheets[:1] if not rows] + [
            (p, variant) for p in sheets[-1:]
        ]:
            rows.append(Image.open(sheet).convert("RGB"))
            ImageDraw.Draw(rows[-1]).text(
                (3, 1),
                f"{name}, step {int(sheet.stem[-4:])}",
                "white",
                stroke_width=1,
                stroke_fill="black",
            )
    if not rows:
        return False
    picture = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    for i, row in enumerate(rows):
        picture.paste(row, (0, sum(r.height for r in rows[:i])))
    picture.save(path, quality=80, method=6)
    return True


def draw(out: Path, figures: Path = Path("figures")) -> list[str]:
    """Draw `figures`/ablation_QUESTION.webp for every question that has runs in `out`, and write
    `figures`/ablations.md and each run's means and the curves' numbers as CSV.

    Returns the table's lines. Raises FileNotFoundError if there are no runs at all.
    """
    figures.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, question in QUESTIONS.items():
        rows = effects(out, question)
        if rows:
            forest(rows, question, figures / f"ablation_{name}.webp")
            lines += [*table(rows, question), ""]
        if name == "text_in_rollouts" and (dead := dead_rewards(out)):
            lines += [*dead, ""]
    if not lines:
        raise FileNotFoundError(
            f"no finished runs in {out}: run python -m realsr_r1.first ablate grpo (or another "
            f"question) first"
        )
    for name in {q.runs for q in QUESTIONS.values()}:
        if (out / f"{name}.csv").exists():
            shutil.copyfile(out / f"{name}.csv", figures / f"ablation_{name}.csv")
    training_curves(out, figures / "ablation_training.webp")
    hack_curves(out, figures / "ablation_hack_curves.webp")
    hack_pictures(out, figures / "ablation_hack_pictures.webp")
    lines.append(
        "Differences, paired by scene and seed; 95% bootstrap intervals over scenes and seeds; "
        "bold: clear of zero."
    )
    (figures / "ablations.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))
    return lines

"""The checks of the reward lesson: what is right passes, and each typical mistake is named."""

import re

import pytest
import torch.nn.functional as F

from realsr_r1.course.checks import rewards as checks
from realsr_r1.first import experts, rewards


def labels(places=None, divide=lambda k, said: k / 5, tidy=str.strip):
    def share(said, true):
        a, b = ([tidy(p) for p in t.split(",")] for t in (said, true))
        hits = (
            sum(p in b for p in a)
            if places == "any"
            else sum(x == y for x, y in zip(a, b, strict=False))
        )
        return divide(hits, [p for p in a if p])

    return share


def package_degradation(said, true):
    return rewards.degradation_reward([f"<degradation> {said} </degradation>"], degradation=[true])[
        0
    ]


def recall(
    find=lambda t, text: re.search(rf"\b{re.escape(t)}\b", text),
    divide=None,
    unique=True,
    lower=True,
    empty=0.0,
):
    def of(text, tags):
        text, tags = (text.lower(), [t.lower() for t in tags]) if lower else (text, tags)
        tags = sorted(set(tags)) if unique else tags
        hits = sum(bool(find(t, text)) for t in tags)
        if divide:
            return divide(hits, text)
        return hits / len(tags) if tags or empty is None else empty

    return of


def package_recall(text, tags):
    return rewards.understanding_reward(
        [f"<rough_understand> {text} </rough_understand>"], tags=[tags]
    )[0]


def f1(score, guard=True):
    def of(said, tags):
        hits = len(said & tags)
        return score(hits, len(said), len(tags)) if hits or not guard else 0.0

    return of


def hinge(
    sign=1,
    least=None,
    slope=None,
    margin=None,
    cut=F.relu,
    mean=lambda h, pairs: h[pairs].mean(),
    safe=True,
):
    def of(logits, away, known, steep, ahead):
        worse, lead = away[None] - away[:, None], sign * (logits[:, None] - logits[None])
        pairs = worse > (known if least is None else least)
        demand = (steep if slope is None else slope) * worse + (ahead if margin is None else margin)
        return mean(cut(demand - lead), pairs) if pairs.any() or not safe else logits.sum() * 0

    return of


def package_hinge(logits, away, known, slope, margin):
    return experts.ranking_loss(logits, away, known=known, slope=slope, margin=margin)[0]


def dead(groups):
    return float((groups.amax(1) - groups.amin(1) < 1e-6).float().mean())


RIGHT = [
    (checks.degradation_share, labels()),
    (checks.degradation_share, package_degradation),
    (checks.tag_recall, recall()),
    (checks.tag_recall, package_recall),
    (checks.tag_f1, f1(lambda h, s, t: 2 * h / (s + t))),
    (checks.ranking_hinge, hinge()),
    (checks.ranking_hinge, package_hinge),
    (checks.zero_spread_share, dead),
    (checks.zero_spread_share, lambda r: (r.std(1) < 1e-6).float().mean()),
]

WRONG = [
    (checks.degradation_share, labels(divide=lambda k, said: k), "divide it by 5"),
    (checks.degradation_share, labels(divide=lambda k, said: float(k == 5)), "all five or nothing"),
    (checks.degradation_share, labels("any"), "place by place"),
    (
        checks.degradation_share,
        labels(divide=lambda k, said: k / max(1, len(said))),
        "divide by the labels that were said",
    ),
    (checks.degradation_share, labels(tidy=str), "strip each part"),
    (checks.degradation_share, lambda said, true: None, "returns nothing"),
    (checks.tag_recall, recall(lambda t, text: t in text), '"car" in "scarf"'),
    (checks.tag_recall, recall(lower=False), "capitals must not matter"),
    (checks.tag_recall, recall(lambda t, text: t in text.split()), "split at spaces"),
    (checks.tag_recall, recall(lambda t, text: t in re.findall(r"\w+", text)), "several words"),
    (
        checks.tag_recall,
        recall(divide=lambda hits, text: hits / len(text.split())),
        "divide by the words of the text",
    ),
    (checks.tag_recall, recall(divide=lambda hits, text: hits), "number of tags found"),
    (checks.tag_recall, recall(empty=None), "divide by zero"),
    (checks.tag_recall, recall(empty=1.0), "no tags at all must give 0"),
    (checks.tag_recall, recall(unique=False), "counts once"),
    (checks.tag_f1, f1(lambda h, s, t: h / t), "recall alone"),
    (checks.tag_f1, f1(lambda h, s, t: h / s), "precision alone"),
    (checks.tag_f1, f1(lambda h, s, t: (h / s + h / t) / 2), "arithmetic mean"),
    (checks.tag_f1, f1(lambda h, s, t: h / (s + t - h)), "intersection over union"),
    (checks.tag_f1, f1(lambda h, s, t: h / (s + t)), "forgot the 2"),
    (checks.tag_f1, f1(lambda h, s, t: 2 / (s / h + t / h), guard=False), "divide by zero"),
    (checks.ranking_hinge, hinge(sign=-1), "wrong sign"),
    (checks.ranking_hinge, hinge(least=0.0), "hardly differ"),
    (checks.ranking_hinge, hinge(mean=lambda h, pairs: (h * pairs).mean()), "n·n places"),
    (checks.ranking_hinge, hinge(mean=lambda h, pairs: h[pairs].sum()), "you summed"),
    (checks.ranking_hinge, hinge(mean=lambda h, pairs: h[pairs]), "without axes"),
    (checks.ranking_hinge, hinge(cut=lambda x: x), "no hinge"),
    (checks.ranking_hinge, hinge(slope=1), "slope has no effect"),
    (checks.ranking_hinge, hinge(slope=0), "same lead"),
    (checks.ranking_hinge, hinge(slope=0, margin=0), "no lead at all"),
    (checks.ranking_hinge, hinge(mean=lambda h, pairs: h[pairs].mean().detach()), "no gradient"),
    (checks.ranking_hinge, hinge(margin=0), "left out the margin"),
    (checks.ranking_hinge, hinge(safe=False), "NaN"),
    (
        checks.zero_spread_share,
        lambda r: float((r.amax(1) == r.amin(1)).sum()),
        "divide by the number of groups",
    ),
    (checks.zero_spread_share, lambda r: 1 - dead(r), "alive"),
    (checks.zero_spread_share, lambda r: float((r == 0).all(1).float().mean()), "just as dead"),
    (
        checks.zero_spread_share,
        lambda r: float((r.amax(0) == r.amin(0)).float().mean()),
        "wrong axis",
    ),
    (
        checks.zero_spread_share,
        lambda r: float((r.amax(1) == r.amin(1)).float().mean()),
        "rounding",
    ),
    (
        checks.zero_spread_share,
        lambda r: float((r.std(1) < 0.01).float().mean()),
        "threshold is too wide",
    ),
]


def name(value):
    return getattr(value, "__name__", None) if callable(value) else str(value)[:30]


@pytest.mark.parametrize("check, student", RIGHT)
def test_right(check, student, capsys):
    assert check(student), capsys.readouterr().out
    assert capsys.readouterr().out == f"✓ {check.__name__}: right\n"


@pytest.mark.parametrize("check, student, words", WRONG, ids=name)
def test_wrong(check, student, words, capsys):
    assert not check(student)
    out = capsys.readouterr().out
    assert out.startswith(f"✗ {check.__name__}: ") and words in out


@pytest.mark.parametrize("check", [c for c, _ in RIGHT[::2]])
def test_stub_is_not_written_yet(check, capsys):
    def stub(*_):
        raise NotImplementedError

    assert not check(stub)
    assert "not written yet" in capsys.readouterr().out

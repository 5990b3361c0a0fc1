"""The checks of the reward lesson: what is right passes, and each typical mistake is named."""

import re
import warnings

import pytest
import torch
from scipy.stats import spearmanr

from realsr_r1.course.checks import rewards as checks
from realsr_r1.rewards import SYNONYMS
from realsr_r1.vlcot import TAGS


def form(
    content=r"\s*\S.*?", once=True, match=re.fullmatch, flags=re.DOTALL, tags=TAGS, gap=r"\s*"
):
    def of(text):
        pattern = gap.join(rf"<{t}>{content}</{t}>" for t in tags)
        single = all(text.count(f"<{t}>") == text.count(f"</{t}>") == 1 for t in TAGS)
        found = match(rf"\s*{pattern}\s*", text, flags)
        return float((single or not once) and found is not None)

    return of


def any_order(text):
    return float(all(re.search(rf"<{t}>\s*\S.*?</{t}>", text, re.DOTALL) for t in TAGS))


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


def cut_s(word):
    return word.rstrip("s")


def table(word):
    return SYNONYMS.get(word, word)


def plurals_alone(word):
    return word if word in ("ship", "woman", "man") else table(word)


def recall(
    lower=str.lower, find=r"\w+", read=table, of_tags=None, inside=False, unique=True, divide=None,
    empty=0.0, several=True,
):  # fmt: skip
    def words(text, read):
        return [read(w) for w in re.findall(find, lower(text))]

    def of(text, tags):
        named = words(text, read)
        wanted = [" ".join(words(t, of_tags or read)) for t in tags]
        wanted = sorted(set(wanted)) if unique is True else wanted
        if unique == "before":
            wanted = [" ".join(words(t, read)) for t in sorted(set(tags))]
        line = " ".join(named) if inside else f" {' '.join(named)} "
        hits = sum((t if inside else f" {t} ") in line if several else t in named for t in wanted)
        if divide:
            return divide(hits, text)
        return hits / len(wanted) if wanted or empty is None else empty

    return of


def scale(score=lambda v, a, b: (v - a) / (b - a), last=lambda s: s.nan_to_num(0.0).clamp(0, 1)):
    return lambda values, zero, one: last(score(values, zero, one))


def in_place(values, zero, one):
    return values.sub_(zero).div_(one - zero).clamp_(0, 1)


def ranks(x):
    return x.argsort(1).argsort(1).float()


def agree(rank=ranks, sign=-1, safe=True):
    def of(scores, away):
        out = checks._pearson(rank(scores), rank(sign * away))
        return torch.where((scores == scores[:, :1]).all(1), 0.0, out) if safe else out

    return of


def by_scipy(scores, away):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [spearmanr(s, -d).statistic for s, d in zip(scores, away, strict=True)]
    return torch.tensor(found)


def plain_pearson(scores, away):
    return agree(lambda x: x)(scores, away).nan_to_num(0.0)


RIGHT = [
    (checks.in_form, form()),
    (checks.in_form, checks.form),
    (checks.degradation_share, labels()),
    (checks.degradation_share, checks.labels_right),
    (checks.tag_recall, recall()),
    (checks.tag_recall, checks.tags_named),
    (checks.unit_scale, scale()),
    (checks.unit_scale, checks.to_unit),
    (checks.group_agreement, agree()),
    (checks.group_agreement, checks.agreement),
    (checks.zero_spread_share, lambda r: (r.std(1) < 1e-6).float().mean()),
    (checks.zero_spread_share, checks.dead),
]

WRONG = [
    (checks.in_form, form(match=re.search), "before the first part"),
    (checks.in_form, form(match=re.match), "after the last part"),
    (checks.in_form, form(flags=0), "re.DOTALL"),
    (checks.in_form, form(once=False), "said twice"),
    (checks.in_form, form(content=".+?"), "empty"),
    (checks.in_form, form(gap=".*?"), "between two parts"),
    (checks.in_form, form(tags=TAGS[:-1], once=False, match=re.match), "words after"),
    (checks.in_form, lambda text: float(re.search("<degr", text) is not None), "before the first"),
    (checks.in_form, lambda text: re.fullmatch("<degr.*", text) is not None, "not bool"),
    (checks.in_form, lambda text: any_order(text) * (text[:4] == "<deg"), "after the last part"),
    (
        checks.in_form,
        lambda text: (
            any_order(text) * (text[:4] == "<deg") * (text[-1] == ">") * (" and" not in text)
        ),
        "another order",
    ),
    (checks.in_form, lambda text: None, "returns nothing"),
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
    (checks.tag_recall, recall(inside=True), '"car" in "scarf"'),
    (checks.tag_recall, recall(lower=str), "capitals must not matter"),
    (checks.tag_recall, recall(find=r"\S+"), "split at spaces"),
    (checks.tag_recall, recall(several=False), "several words"),
    (checks.tag_recall, recall(read=str), "want the same word"),
    (checks.tag_recall, recall(read=cut_s), "not enough"),
    (checks.tag_recall, recall(of_tags=plurals_alone, read=plurals_alone), "not for plurals alone"),
    (
        checks.tag_recall,
        recall(of_tags=lambda w: "person" if w in ("man", "woman") else w),
        "words of the tags",
    ),
    (checks.tag_recall, recall(divide=lambda h, text: h / len(text.split())), "words of the text"),
    (checks.tag_recall, recall(divide=lambda h, text: h), "number of tags found"),
    (checks.tag_recall, recall(empty=None), "divide by zero"),
    (checks.tag_recall, recall(empty=1.0), "no tags at all must give 0"),
    (checks.tag_recall, recall(unique=False), "counts once"),
    (checks.tag_recall, recall(unique="before"), "are one tag"),
    (checks.unit_scale, scale(lambda v, a, b: (v - b) / (a - b)), "upside down"),
    (checks.unit_scale, scale(lambda v, a, b: 1 - v / a), "divide by one - zero"),
    (checks.unit_scale, scale(lambda v, a, b: (max(a, b) - v) / abs(a - b)), "turn every scale"),
    (checks.unit_scale, scale(last=lambda s: s.nan_to_num(0.0)), "clamp it"),
    (checks.unit_scale, scale(last=lambda s: s.clamp(0, 1)), "nan_to_num"),
    (
        checks.unit_scale,
        scale(lambda v, a, b: (v.nan_to_num(0.0) - a) / (b - a)),
        "NaN must score 0",
    ),
    (checks.unit_scale, in_place, "in place"),
    (checks.unit_scale, lambda v, a, b: float(scale()(v, a, b).mean()), "score for each value"),
    (checks.group_agreement, agree(sign=1), "sign is turned"),
    (checks.group_agreement, plain_pearson, "take ranks first"),
    (checks.group_agreement, agree(lambda x: x.argsort(1).float()), "argsort of argsort"),
    (checks.group_agreement, agree(safe=False), "ranks mean nothing"),
    (checks.group_agreement, by_scipy, "divide by zero"),
    (checks.group_agreement, lambda s, d: agree()(s.T, d.T), "wrong axis"),
    (
        checks.group_agreement,
        lambda s, d: agree()(s.view(1, -1), d.view(1, -1)),
        "one number for all",
    ),
    (checks.group_agreement, lambda s, d: agree()(s, d).tolist(), "return a tensor"),
    (
        checks.zero_spread_share,
        lambda r: float((r.amax(1) == r.amin(1)).sum()),
        "divide by the number of groups",
    ),
    (checks.zero_spread_share, lambda r: 1 - checks.dead(r), "alive"),
    (checks.zero_spread_share, lambda r: float(r.std()), "count such groups"),
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
    assert out.startswith(f"✗ {check.__name__}: ") and words in out, out


@pytest.mark.parametrize("check", [c for c, _ in RIGHT[::2]])
def test_stub_is_not_written_yet(check, capsys):
    def stub(*_):
        raise NotImplementedError

    assert not check(stub)
    assert "not written yet" in capsys.readouterr().out


def test_each_check_has_three_named_mistakes():
    for check in {c for c, _ in RIGHT}:
        assert sum(c is check for c, _, _ in WRONG) >= 3

"""Checks for notebook 04: form, labels, tags, a metric's scale, agreement within groups, groups
without spread.

The functions before the checks are what `use` falls back on.
"""

import torch
from scipy.stats import spearmanr
from torch import Tensor

from realsr_r1 import rewards, vlcot
from realsr_r1.course.checks import Mistake, check, expect, number


def form(completion: str) -> float:
    """The package's format reward of one completion."""
    return rewards.format_reward([completion])[0]


def labels_right(said: str, true: str) -> float:
    """The package's degradation reward of one sentence."""
    return rewards.degradation_reward([_part("degradation", said)], degradation=[true])[0]


def tags_named(text: str, tags: list[str]) -> float:
    """The package's understanding reward of one text."""
    return rewards.understanding_reward([_part("rough_understand", text)], tags=[tags])[0]


def to_unit(values: Tensor, zero: float, one: float) -> Tensor:
    """Values (b,) of a metric on a scale from 0 to 1, as `quality.PyiqaExpert` puts them."""
    return ((values - zero) / (one - zero)).nan_to_num(0.0).clamp(0, 1)


def agreement(scores: Tensor, away: Tensor) -> Tensor:
    """Spearman's rank correlation of scores (groups, k) and -LPIPS (groups, k) → (groups,); 0 for a
    group whose scores are all equal."""
    flat = (scores == scores[:, :1]).all(1)
    found = [
        0.0 if f else spearmanr(s.numpy(), -d.numpy()).statistic
        for s, d, f in zip(scores.cpu(), away.cpu(), flat.tolist(), strict=True)
    ]
    return torch.tensor(found, dtype=torch.float32)


def dead(groups: Tensor) -> float:
    """Share of the groups (groups, k) without spread."""
    return float((groups.amax(1) - groups.amin(1) < 1e-6).float().mean())


def _part(tag: str, text: str) -> str:
    return f"<{tag}> {text} </{tag}>"


def _near(a: float, b: float) -> bool:
    return abs(a - b) < 1e-5


def _toy(*tags: str) -> str:
    """Parts in the order of `tags`, images of one code."""
    content = {
        t: "<image> <c7> </image>" if t in vlcot.IMAGE_TAGS else "a bird" for t in vlcot.TAGS
    }
    return " ".join(_part(t, content[t]) for t in tags)


@check
def in_form(student) -> None:
    """(completion) → 1.0 if it is the seven parts in order, each once, with nothing around them."""
    tags, whole = vlcot.TAGS, _toy(*vlcot.TAGS)

    def one(text: str) -> float:
        return number(student(text), "1.0 or 0.0")

    expect(one(whole) == 1, f"the seven parts in order are 1, you give {one(whole):g}")
    lines = whole.replace("> <", ">\n<")
    expect(one(lines) == 1, "a line break is a space, too: a dot needs re.DOTALL to match it")
    expect(one("so , " + whole) == 0, "words before the first part must give 0: use re.fullmatch")
    expect(one(whole + " done") == 0, "words after the last part must give 0: use re.fullmatch")
    between = whole.replace("</rough_image>", "</rough_image> and")
    expect(one(between) == 0, "words between two parts must give 0: only space may stand there")
    expect(one(_toy(*tags[:-1])) == 0, "the last part is missing and you give 1")
    swapped = _toy(tags[0], tags[3], tags[2], tags[1], *tags[4:])
    expect(one(swapped) == 0, "all parts are there, but in another order: that is 0")
    for i, tag in enumerate(tags):
        twice = _toy(*tags[: i + 1], *tags[i:])
        expect(
            one(twice) == 0,
            f"<{tag}> is said twice and you give 1: `.+?` runs across the second copy, so count "
            "each tag",
        )
        empty = whole.replace(_toy(tag), _part(tag, ""))
        expect(one(empty) == 0, f"<{tag}> holds nothing but space, it is empty: that is 0")


@check
def degradation_share(student) -> None:
    """(what the chain says, the truth), two sentences → k / 5."""
    true = "medium blur, downsample, heavy noise, light compression, upsample"

    def share(said: str) -> float:
        return number(student(said, true), "the share of labels that are right")

    whole = share(true)
    expect(not _near(whole, 5), "you return the number of right labels: divide it by 5")
    expect(_near(whole, 1), f"all five labels right is 1, you give {whole:g}")
    spaced = share(true.replace(",", " ,"))
    expect(
        _near(spaced, 1),
        "a space before a comma must not matter (the policy writes one): strip each part",
    )
    three = share("medium blur, downsample, light noise, light compression, keep")
    expect(
        not _near(three, 0), "you ask for all five or nothing: three right labels of five earn 0.6"
    )
    expect(_near(three, 0.6), f"three right labels of five are 3/5 = 0.6, you give {three:g}")
    swapped = share("medium blur, upsample, heavy noise, light compression, downsample")
    expect(
        not _near(swapped, 1),
        "you look for a label anywhere: the two resizes differ by their place alone, so compare "
        "place by place",
    )
    expect(
        _near(swapped, 0.6),
        f"with the two resizes swapped 3 of 5 places are right, you give {swapped:g}",
    )
    short = share("medium blur, downsample")
    expect(
        not _near(short, 1),
        "you divide by the labels that were said: two of five is 0.4, or silence would pay",
    )
    expect(_near(short, 0.4), f"two right labels and then nothing are 2/5, you give {short:g}")
    expect(_near(share(""), 0), "an empty sentence earns 0")
    expect(
        _near(share(true + ", heavy blur"), 1),
        "words after the fifth label do not count: still divide by 5",
    )


@check
def tag_recall(student) -> None:
    """(text, tags) → share of the tags that the text names as whole words, synonyms replaced."""

    def recall(text: str, tags: list[str]) -> float:
        return number(student(text, tags), "the share of tags that are named")

    three = recall("a man with a hat beside a car", ["man", "hat", "car", "tree"])
    expect(
        not _near(three, 3), "you return the number of tags found: divide it by the number of tags"
    )
    expect(
        not _near(three, 3 / 8),
        "you divide by the words of the text: this is the share of the tags, so divide by their "
        "number",
    )
    expect(_near(three, 0.75), f"three of four tags are named, which is 0.75; you give {three:g}")
    scarf = recall("a woman with a scarf", ["car", "woman"])
    expect(
        not _near(scarf, 1), 'you found "car" in "scarf": compare whole words, not parts of words'
    )
    expect(
        _near(scarf, 0.5),
        f'of "car" and "woman" the text "a woman with a scarf" names one: 0.5, you give {scarf:g}',
    )
    expect(
        _near(recall("A Bird on Grass", ["bird", "grass"]), 1),
        "capitals must not matter: bring both sides to lower case",
    )
    expect(
        _near(recall("a bird, on grass.", ["bird", "grass"]), 1),
        "a comma or a full stop sticks to a word when you split at spaces: find the words with "
        r'the pattern "\w+"',
    )
    expect(
        _near(recall("a polar bear on sand", ["polar bear", "sand"]), 1),
        "a tag may have several words: look for it as a whole in the text",
    )
    _plurals(recall)
    try:
        none = recall("a bird", [])
    except ZeroDivisionError as e:
        raise Mistake(
            "no tags at all: you divide by zero there, as the released code does; return 0"
        ) from e
    expect(_near(none, 0), "no tags at all must give 0: there was nothing to be right about")
    twice = recall("a bird", ["bird", "bird", "grass"])
    expect(
        _near(twice, 0.5), "a tag that is listed twice counts once: make a set of the tags first"
    )
    alike = recall("a leaf", ["leaves", "leaf", "sky"])
    expect(
        _near(alike, 0.5),
        '"leaves" and "leaf" are one tag: replace the words before you make a set of the tags',
    )


def _plurals(recall) -> None:
    tulips = recall("tulips in a field", ["tulip", "field"])
    expect(
        not _near(tulips, 0.5),
        '"tulips" names the tag "tulip", but you want the same word: look words up in SYNONYMS',
    )
    expect(_near(tulips, 1), f"tulips in a field name both tags: 1, you give {tulips:g}")
    expect(
        _near(recall("leaves", ["leaf"]), 1),
        '"leaves" is the plural of "leaf": cutting off an s is not enough, use the table SYNONYMS',
    )
    expect(
        _near(recall("a bird under a cloud", ["bird", "clouds"]), 1),
        'the tag "clouds" is named by "a cloud": replace the words of the tags as well',
    )
    expect(
        _near(recall("a ship", ["boat"]), 1),
        'SYNONYMS reads "ship" as "boat": use the table for all words, not for plurals alone',
    )


@check
def unit_scale(student) -> None:
    """(values (b,), the value that scores 0, the value that scores 1) → scores (b,) in [0, 1]."""
    values = torch.tensor([40.0, 21.0, 2.0])
    kept = values.clone()
    out = student(values, 40.0, 2.0)
    expect(out is not None, "your function returns nothing: end it with return")
    expect(
        isinstance(out, Tensor) and out.shape == (3,), "return a tensor with a score for each value"
    )
    expect(torch.equal(values, kept), "you changed the values in place: others still need them")
    got = [round(float(x), 4) for x in out]
    expect(got != [1.0, 0.5, 0.0], "upside down: `zero` is the value that scores 0, `one` scores 1")
    expect(
        not _near(got[1], 1 - 21 / 40),
        "you forgot where the scale ends: at `one` the score is 1, so divide by one - zero",
    )
    expect(got == [0.0, 0.5, 1.0], f"40, 21 and 2 from 40 to 2 are 0, 0.5 and 1, you give {got}")
    up = student(torch.tensor([0.0, 30.0, 100.0]), 0.0, 100.0)
    expect(
        torch.allclose(up, torch.tensor([0.0, 0.3, 1.0])),
        "where higher is better (zero=0, one=100) 30 scores 0.3: do not turn every scale around",
    )
    beyond = student(torch.tensor([55.0, -3.0]), 40.0, 2.0)
    expect(
        torch.allclose(beyond, torch.tensor([0.0, 1.0])),
        "a value beyond the ends must stay in [0, 1]: clamp it, or the trainer refuses it",
    )
    lost = student(torch.tensor([torch.nan, 2.0]), 40.0, 2.0)
    expect(
        not bool(lost.isnan().any()),
        "a metric without a number for a picture gives NaN, and NaN passes through clamp: "
        "nan_to_num",
    )
    expect(
        torch.allclose(lost, torch.tensor([0.0, 1.0])),
        "NaN must score 0, the worst: replace it after the scaling, not before",
    )


@check
def group_agreement(student) -> None:
    """(scores (groups, k), LPIPS (groups, k)) → rank correlation of score and -LPIPS, (groups,)."""
    g = torch.Generator().manual_seed(0)
    scores, away = torch.rand(4, 6, generator=g) ** 3, torch.rand(4, 6, generator=g)
    right, out = agreement(scores, away), student(scores.clone(), away.clone())
    expect(out is not None, "your function returns nothing: end it with return")
    expect(isinstance(out, Tensor), f"return a tensor, not {type(out).__name__}")
    expect(
        out.numel() != 1,
        "you return one number for all: correlate within each group (a row), one number a group",
    )
    expect(
        out.shape != (6,),
        "you correlate along the wrong axis: a group is a row, its chains columns",
    )
    expect(out.shape == (4,), f"four groups make the shape (4,), you give {tuple(out.shape)}")

    def same(wrong: Tensor) -> bool:
        return bool(torch.allclose(out.float(), wrong.float(), atol=1e-4))

    expect(
        not same(-right),
        "the sign is turned: LPIPS is small where a picture is good, so correlate with -LPIPS",
    )
    for wrong, sentence in (
        (_pearson(scores, -away), "these are the values' correlations: take ranks first"),
        (
            _pearson(*(x.argsort(1).float() for x in (scores, -away))),
            "argsort gives the order, not the ranks: the rank of each value is argsort of argsort",
        ),
    ):
        expect(not same(wrong) and not same(-wrong), sentence)
    expect(same(right), f"expected {right.tolist()}, you give {out.tolist()}")
    flat = student(torch.tensor([[0.5] * 4, [0.1, 0.2, 0.3, 0.4]]), torch.rand(2, 4, generator=g))
    expect(
        not bool(flat.isnan().any()),
        "where all scores of a group are equal you divide by zero: such a group agrees by 0",
    )
    expect(
        _near(float(flat[0]), 0),
        "where all scores of a group are equal the ranks mean nothing: give 0 there",
    )


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    x, y = (z - z.mean(1, keepdim=True) for z in (x, y))
    return (x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()


@check
def zero_spread_share(student) -> None:
    """(rewards (groups, k)) → share of the groups in which all rewards are equal."""
    table = torch.tensor(
        [
            [0.2, 0.2, 0.2, 0.2],
            [0.0, 0.0, 0.0, 0.0],
            [0.2, 0.2, 0.2, 0.4],
            [1.0, 0.0, 1.0, 0.0],
            [0.1, 0.2, 0.3, 0.4],
        ]
    )
    out = student(table)
    expect(out is not None, "your function returns nothing: end it with return")
    value = number(out, "the share of dead groups")
    expect(
        not _near(value, 2), "you return the number of dead groups: divide by the number of groups"
    )
    expect(
        not _near(value, 0.6),
        "this is the share of groups that are alive: count those without spread",
    )
    expect(
        not _near(value, 0.2),
        "you count the groups whose rewards are 0: a group that all got 0.2 is just as dead, "
        "the spread counts",
    )
    expect(
        not _near(value, 0.0),
        "you look along the wrong axis (a row is a group), or at the whole table at once",
    )
    expect(
        _near(value, 0.4),
        f"two of five groups have equal rewards throughout, so 0.4; you give {value:g}: count such "
        "groups",
    )
    rounded = torch.tensor([[0.3, 0.1 + 0.2, 0.3, 0.3]], dtype=torch.float64)
    expect(
        _near(float(student(rounded)), 1),
        "0.3 and 0.1 + 0.2 differ in their last digit only, which is rounding and no spread: "
        "compare with a small number such as 1e-6, not with 0",
    )
    single = torch.tensor([[0.2, 0.2, 0.2, 0.2001]])
    expect(
        _near(float(student(single)), 0),
        "a small spread is a spread: your threshold is too wide (1e-6 is enough)",
    )

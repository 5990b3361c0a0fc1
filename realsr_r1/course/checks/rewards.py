"""Checks for the lesson on rewards: degradation share, tag recall, tag F1, ranking hinge, groups
without spread."""

import math

import torch
import torch.nn.functional as F

from realsr_r1.course.checks import Mistake, check, expect


def _number(out, what: str) -> float:
    expect(out is not None, "your function returns nothing: end it with return")
    expect(
        isinstance(out, int | float) and not isinstance(out, bool),
        f"return one number ({what}), not {type(out).__name__}",
    )
    return float(out)


def _near(a: float, b: float) -> bool:
    return abs(a - b) < 1e-5


@check
def degradation_share(student) -> None:
    """(what the chain says, the truth), two sentences → k / 5."""
    true = "medium blur, downsample, heavy noise, light compression, upsample"

    def share(said: str) -> float:
        return _number(student(said, true), "the share of labels that are right")

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
    """(text, tags) → share of the tags that the text names as whole words."""

    def recall(text: str, tags: list[str]) -> float:
        return _number(student(text, tags), "the share of tags that are named")

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
        "a comma or a full stop sticks to a word when you split at spaces: use a word boundary "
        "(\\b) or strip it",
    )
    expect(
        _near(recall("a polar bear on sand", ["polar bear", "sand"]), 1),
        "a tag may have several words: look for it as a whole in the text",
    )
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


@check
def tag_f1(student) -> None:
    """(things named, tags), two sets of words → F1."""

    def f1(said: set[str], tags: set[str]) -> float:
        return _number(student(said, tags), "F1")

    said, tags = {"bird", "grass", "car", "wall", "coin"}, {"bird", "grass", "tree"}
    expect(
        _near(f1({"bird"}, {"bird"}), 1) or _near(f1({"bird"}, {"bird"}), 0.5),
        "one thing named, and right, is a perfect 1",
    )
    value = f1(said, tags)
    precision, recall = 2 / 5, 2 / 3
    expect(not _near(value, recall), "this is recall alone: naming everything still scores 1")
    expect(
        not _near(value, precision),
        "this is precision alone: naming a single safe thing would score 1",
    )
    expect(
        not _near(value, (precision + recall) / 2),
        "this is the arithmetic mean of precision and recall: F1 is their harmonic mean, which "
        "the smaller one rules",
    )
    expect(
        not _near(value, 2 / 6),
        "this is intersection over union: F1 divides twice the hits by the two sizes added",
    )
    expect(
        not _near(value, 2 / 8),
        "you forgot the 2: hits count once in each of the two sets below the line",
    )
    expect(
        _near(value, 0.5), f"2 hits, 5 named, 3 tags: F1 = 2·2/(5 + 3) = 0.5, you give {value:g}"
    )
    for a, b, why in (
        (set(), {"bird"}, "nothing is named"),
        ({"car"}, {"bird"}, "nothing is hit"),
        (set(), set(), "both sets are empty"),
    ):
        try:
            zero = f1(a, b)
        except ZeroDivisionError as e:
            raise Mistake(f"where {why} you divide by zero: return 0 there") from e
        expect(_near(zero, 0), f"where {why} the score is 0, you give {zero:g}")


@check
def ranking_hinge(student) -> None:
    """(logits (n,), LPIPS (n,), known, slope, margin) → mean hinge over the pairs whose order is
    known."""
    logits = torch.tensor([1.0, 2.0, -1.0, 0.5], requires_grad=True)
    away = torch.tensor([0.0, 0.3, 0.5, 0.31])
    kept = logits.detach().clone()
    out = student(logits, away, 0.02, 6.0, 0.2)
    expect(
        torch.equal(logits.detach(), kept),
        "you changed the logits in place: the network still needs them",
    )
    expect(
        isinstance(out, torch.Tensor),
        f"return a tensor, not {type(out).__name__}: the gradient has to flow through it",
    )
    expect(
        out.dim() == 0,
        f"return one number (a tensor without axes), got the shape {tuple(out.shape)}: take the "
        f"mean over the pairs",
    )
    expect(
        out.requires_grad,
        "the result carries no gradient: do not use item(), detach() or a comparison as the loss",
    )
    value = float(out.detach())
    worse, lead = (
        away[None] - away[:, None],
        kept[:, None] - kept[None],
    )  # [i, j]: by how much j is worse, and i leads
    pairs = worse > 0.02
    demand = 6 * worse + 0.2
    hinge = F.relu(demand - lead)
    right = float(hinge[pairs].mean())
    if not math.isclose(value, right, abs_tol=1e-4):
        wrong = {
            "the lead has the wrong sign: the better picture (the smaller LPIPS) must have the "
            "larger logit": F.relu(demand + lead)[pairs],
            "you kept the pairs whose LPIPS hardly differ: nobody knows their order, so leave "
            "out what differs by no more than `known`": hinge[worse > 0],
            "you averaged over all n·n places: divide by the number of known pairs": hinge * pairs,
            "you summed: take the mean, or the loss grows with the square of the batch": hinge[
                pairs
            ].sum(),
            "there is no hinge: without relu a pair that is far enough in order pulls the "
            "others' loss down": (demand - lead)[pairs],
            "the slope has no effect: the lead grows by slope × the difference in LPIPS": F.relu(
                worse + 0.2 - lead
            )[pairs],
            "you left out the margin: even a small difference demands that lead": F.relu(
                6 * worse - lead
            )[pairs],
            "every pair demands the same lead: it should grow with the difference in LPIPS": F.relu(
                0.2 - lead
            )[pairs],
            "you demand no lead at all: being ahead by a hair then costs nothing": F.relu(-lead)[
                pairs
            ],
        }
        for sentence, terms in wrong.items():
            expect(not math.isclose(value, float(terms.mean()), abs_tol=1e-4), sentence)
        raise Mistake(
            f"expected {right:.4f} for four pictures of which five pairs have a known order, "
            f"got {value:.4f}"
        )
    empty = student(
        torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([0.2, 0.2]), 0.02, 6.0, 0.2
    )
    expect(
        bool(torch.isfinite(empty)),
        "where no pair is known you take the mean of nothing, which is NaN: return 0 there",
    )
    expect(float(empty.detach()) == 0, "where no pair is known the loss is 0")


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
    out = out.item() if isinstance(out, torch.Tensor) and out.numel() == 1 else out
    value = _number(out, "the share of dead groups")
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
        f"two of five groups have equal rewards throughout: 0.4, you give {value:g}",
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

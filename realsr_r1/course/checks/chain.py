"""Checks for the lesson on the chain and its cold start: labels, weighted loss, the cell above,
log-probability, entropy top-k; `reference` holds a right version of those that the package has not
by this name."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from realsr_r1.course.checks import Mistake, check, expect, expect_shape


def _labels(ids: torch.Tensor, prompt: int, pad: int = 0) -> torch.Tensor:
    out = ids.clone()
    out[:, :prompt] = -100
    out[ids == pad] = -100
    return out


def _weighted(logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    keep = target != -100
    loss = F.cross_entropy(logits[keep], target[keep], reduction="none")
    return (loss * weights[target[keep]]).sum() / weights[target[keep]].sum()


def _parent(r: int, c: int, fine: int, coarse: int) -> int:
    step = fine // coarse
    return (r // step) * coarse + c // step


def _logprob(logits: torch.Tensor, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    logp = logits[:, prompt - 1 : -1].log_softmax(-1)
    return logp.gather(-1, ids[:, prompt:, None])[..., 0].sum(1)


reference = SimpleNamespace(
    labels=_labels, weighted_cross_entropy=_weighted, parent=_parent, sequence_logprob=_logprob
)


@check
def labels(student) -> None:
    """(ids (b, n), prompt length, pad id) → labels (b, n)."""
    ids = torch.tensor(
        [[7, 8, 9, 5, 6, 7, 1, 0], [9, 9, 8, 6, 1, 0, 0, 0], [8, 7, 7, 4, 4, 4, 4, 1]]
    )
    kept, prompt = ids.clone(), 3
    want = _labels(ids, prompt)
    out = student(ids, prompt, 0)
    expect(
        torch.equal(ids, kept),
        "you changed the ids themselves: work on a clone, the model still needs them as its input",
    )
    expect_shape(out, tuple(ids.shape), "one label a token")
    if torch.equal(out.long(), want):
        padded = ids.where(ids != 0, 2)  # another padding in the same places
        other = padded.where(ids != 0, -100)
        other[:, :2] = -100
        expect(
            torch.equal(student(padded, 2, 2).long(), other),
            "right for a prompt of 3 tokens and the padding 0 only: use the arguments",
        )
        return
    shifted = torch.full_like(want, -100)
    shifted[:, :-1] = want[:, 1:]
    expect(
        not torch.equal(out[:, :-1].long(), shifted[:, :-1]),
        "you shifted the labels by one: the model (or the loss) does that itself",
    )
    expect(
        not bool((out[:, :prompt] != -100).all()),
        "you train on the prompt: its labels must be -100, not its tokens",
    )
    expect(
        not bool((out[:, prompt:][kept[:, prompt:] == 0] != -100).any()),
        "you train on the padding: a label there must be -100, or the model learns to say <pad>",
    )
    expect(
        bool((out[:, prompt] != -100).all()),
        "the first token of the completion is masked, too: the prompt ends just before it",
    )
    expect(
        bool((out[:, :prompt] == -100).all()),
        "the last token of the prompt is not masked: count again from where the completion starts",
    )
    expect(
        bool((out[kept == 1] == 1).all()),
        "you masked the end token: without it the model never learns to stop",
    )
    raise Mistake("the labels of the completion must be its own tokens, unchanged")


@check
def weighted_cross_entropy(student) -> None:
    """(logits (n, v), target (n,), weights (v,)) → scalar."""
    probabilities = torch.tensor(
        [[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.2, 0.2, 0.6]]
    )
    logits, weights = probabilities.log() + 3.0, torch.tensor([3.0, 1.0, 2.0])
    target = torch.tensor([0, 1, -100, 0])
    loss = [-math.log(0.5), -math.log(0.8), -math.log(0.2)]
    right = (3 * loss[0] + loss[1] + 3 * loss[2]) / 7
    try:
        out = student(logits, target, weights)
    except IndexError as e:
        raise Mistake(
            "you look up the weight or the loss of target -100: leave those positions out first"
        ) from e
    expect(
        isinstance(out, torch.Tensor) and out.dim() == 0,
        "return one number (a tensor without axes): the mean over the positions",
    )
    value = float(out)
    if abs(value - right) < 1e-4:
        return
    total = 7 * right
    expect(
        abs(value - total) > 1e-4, "you summed but did not divide: divide by the sum of the weights"
    )
    expect(
        abs(value - total / 3) > 1e-4,
        "you divided by the number of tokens: divide by the sum of their weights, or a larger "
        "weight is only a larger learning rate",
    )
    expect(
        abs(value - total / 4) > 1e-4,
        "you divided by all positions, those with target -100 as well: leave them out of the mean",
    )
    expect(
        abs(value - total / 6) > 1e-4,
        "you divided by the sum of the whole weight table: divide by the weights of the targets "
        "at hand",
    )
    expect(
        abs(value - sum(loss) / 3) > 1e-4,
        "the weights have no effect: multiply each position's loss by the weight of its token",
    )
    doubled = F.cross_entropy(probabilities[target >= 0], target[target >= 0], reduction="none")
    wrong = float((doubled * weights[target[target >= 0]]).sum() / 7)
    expect(
        abs(value - wrong) > 1e-4,
        "you took the softmax twice: cross_entropy wants logits, not probabilities",
    )
    by_position = (3 * loss[0] + loss[1] + 2 * loss[2]) / 6
    expect(
        abs(value - by_position) > 1e-4,
        "you took the weights in the order of positions: look them up by token, weights[target]",
    )
    raise Mistake(
        f"expected {right:.4f} for three tokens of weights 3, 1, 3 (one more is masked), got "
        f"{value:.4f}"
    )


@check
def parent(student) -> None:
    """(row, column, fine, coarse) → index of the coarse cell at that place."""
    cells = [
        (r, c, f, k) for f, k in ((16, 8), (8, 4), (16, 4)) for r in range(f) for c in range(f)
    ]
    got = {x: student(*x) for x in cells}
    expect(got[0, 0, 16, 8] is not None, "you returned nothing: end with `return`")
    expect(not isinstance(got[3, 3, 16, 8], float), "an index is an integer: divide with //")

    def mistake(rule) -> bool:
        return all(got[x] == rule(*x) for x in cells)

    expect(
        not mistake(lambda r, c, f, k: (c * k // f) * k + r * k // f),
        "you swapped row and column: cells are counted row by row",
    )
    expect(
        not mistake(lambda r, c, f, k: (r * k // f) * f + c * k // f),
        "a row of the coarse image has `coarse` cells, not `fine`",
    )
    expect(
        not mistake(lambda r, c, f, k: r * k + c),
        "you did not divide: two rows (or more) of the fine image lie in one coarse row",
    )
    expect(
        not mistake(lambda r, c, f, k: (r // 2) * k + c // 2),
        "you always divide by 2: the fine image may have four cells for one coarse cell",
    )
    for (r, c, f, k), value in got.items():
        right = _parent(r, c, f, k)
        expect(
            value == right,
            f"cell ({r}, {c}) of {f} a side lies in cell {right} of {k} a side, you say {value}",
        )


@check
def sequence_logprob(student) -> None:
    """(logits (b, n, v), ids (b, n), prompt length) → log-probability of each completion, (b,)."""
    g = torch.Generator().manual_seed(0)
    b, n, v, p = 2, 7, 5, 3
    logits, ids = 2 * torch.randn(b, n, v, generator=g), torch.randint(0, v, (b, n), generator=g)
    logp = logits.log_softmax(-1)

    def pick(table: torch.Tensor, first: int, last: int, offset: int) -> torch.Tensor:
        """The entries of tokens first … last - 1, read `offset` positions before."""
        rows = range(first, last)
        return torch.stack([table[:, i - offset].gather(1, ids[:, i, None])[:, 0] for i in rows], 1)

    right = pick(logp, p, n, 1).sum(1)
    out = student(logits, ids, p)
    expect(isinstance(out, torch.Tensor), f"return a tensor, not {type(out).__name__}")
    expect(
        out.shape != (b, n - p), "that is one number a token: sum over the tokens of the completion"
    )
    expect(
        out.dim() > 0,
        "one number for each row of the batch, not one for all: sum over the tokens only",
    )
    expect_shape(out, (b,), "one number a row")

    def is_(other):
        return torch.allclose(out.float(), other, atol=1e-4)

    if is_(right):
        expect(
            torch.allclose(student(logits, ids, 2).float(), pick(logp, 2, n, 1).sum(1), atol=1e-4),
            "right for a prompt of 3 tokens only: use the prompt length that is given",
        )
        return
    expect(
        not is_(pick(logp, p, n, 0).sum(1)),
        "you forgot to shift by one: the logits at position i are about token i + 1",
    )
    expect(
        not is_(pick(logp, p, n - 1, -1).sum(1)),
        "you shifted the wrong way: token i is predicted by the logits at i - 1",
    )
    expect(
        not is_(pick(logp, 1, n, 1).sum(1)), "the prompt is in your sum: it was given, not chosen"
    )
    expect(
        not is_(pick(logp, p + 1, n, 1).sum(1)),
        "the first token of the completion is missing: the last position of the prompt predicts it",
    )
    expect(
        not is_(pick(logp, p - 1, n, 1).sum(1)),
        "the last token of the prompt is in your sum: start one token later",
    )
    expect(
        not is_(right / (n - p)),
        "you took the mean: the log-probability of a sequence is the sum over its tokens",
    )
    expect(
        not is_(pick(logits, p, n, 1).sum(1)),
        "you forgot log_softmax: logits are not log-probabilities",
    )
    expect(
        not is_(-right),
        "the sign is wrong: a log-probability is negative (its negative is the loss)",
    )
    expect(
        not is_(pick(logp.exp(), p, n, 1).sum(1)),
        "you added probabilities: take their logarithms first",
    )
    expect(
        not is_(right.exp()),
        "that is the probability: leave it as a logarithm, or long sequences underflow to 0",
    )
    raise Mistake(
        f"for a small random example {[round(x, 3) for x in right.tolist()]} is right, yours is "
        f"{[round(x, 3) for x in out.tolist()]}"
    )


@check
def entropy_top_k(student) -> None:
    """Logits (b, v) → k (b,) = 1 + 1999·sigmoid(H − 5), with the entropy H in nats."""
    masked = torch.zeros(1, 300)
    masked[0, 148:] = float("-inf")  # what the grammar forbids
    certain = torch.full((1, 300), -1e4)
    certain[0, 3] = 0
    k = student(torch.cat([torch.zeros(1, 300), certain]))
    expect(isinstance(k, torch.Tensor), f"return a tensor, not {type(k).__name__}")
    expect_shape(k, (2,), "one k a row")
    k = k.double()

    def formula(h):
        return 1 + 1999 / (1 + math.exp(5 - h))

    def near(a, b):
        return abs(float(a) - b) < 1.6

    h = math.log(300)
    expect(
        not (near(k[0], 14.4) and near(k[1], 14.4)),
        "your entropy is always 0: take the softmax over the tokens (the last axis), of each row",
    )
    one = 1 + 1 / (1 + math.exp(5 - h))
    expect(
        abs(float(k[0]) - one) > 0.4,
        "k comes out as 1 or 2 for an unsure row: multiply the sigmoid by 1999",
    )
    expect(not near(k[0], formula(-h)), "your entropy is negative: H = -Σ p·log p, with the minus")
    expect(
        not near(k[0], formula(h / math.log(2))),
        "your entropy is in bits: take the natural logarithm",
    )
    expect(
        not near(k[0], formula(0) + formula(10) - formula(h)),
        "k must grow with the entropy: sigmoid(H − 5), not sigmoid(5 − H)",
    )
    expect(not near(k[0], formula(h + 5)), "subtract 5 from the entropy inside the sigmoid")
    expect(
        near(k[0], formula(h)),
        f"300 equally likely tokens have H = {h:.2f} nats and k = {formula(h):.0f}, yours is "
        f"{float(k[0]):.0f}",
    )
    expect(near(k[1], formula(0)), f"one certain token has H = 0, so k = 14: not {float(k[1]):.0f}")
    expect(
        abs(float(k[0]) - round(formula(h))) < 0.6 and abs(float(k[1]) - round(formula(0))) < 0.6,
        f"k is 1 + 1999·sigmoid(H − 5), rounded: {round(formula(h))} and {round(formula(0))} here, "
        f"yours are {float(k[0]):g} and {float(k[1]):g}",
    )
    out = float(student(masked)[0])
    expect(
        math.isfinite(out) and out >= 1 and out < 1e6,
        "tokens that the grammar forbids (logit -inf) make your entropy nan: 0·(-inf) must count "
        "as 0",
    )
    expect(
        near(out, formula(math.log(148))),
        "tokens that the grammar forbids (logit -inf) change your entropy: they must count as 0",
    )
    wide = float(student(torch.zeros(1, 60_000))[0])
    expect(
        near(wide, formula(10)),
        "clamp the entropy to 0–10 nats: 60,000 equally likely tokens give k = 1987",
    )
    expect(
        not torch.is_floating_point(student(torch.zeros(1, 5))),
        "k is a number of tokens: round it and make it an integer",
    )

"""Checks for the lesson on VLCoT-GRPO: advantages, clipping, the KL estimator, log-probabilities,
the masked mean, a stopping rule.

`reference` holds a right version of each, with which the notebook goes on whether or not the
exercises are done.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from realsr_r1 import objective
from realsr_r1.course.checks import Mistake, check, expect, expect_shape


def _completion_logprobs(logits: Tensor, ids: Tensor, prompt: int) -> Tensor:
    """Logits (b, p + n, v) of prompt and completion, their ids (b, p + n), p → log-probability of
    each completion token, (b, n)."""
    logp = logits[:, prompt - 1 : -1].log_softmax(-1)
    return logp.gather(-1, ids[:, prompt:, None])[..., 0]


def _stop_at(entropy: list[float], share: float = 0.5, patience: int = 2) -> int | None:
    """Entropy of each step → index of the step at which it has been under share · entropy[0] for
    `patience` steps in a row."""
    run = 0
    for i, h in enumerate(entropy):
        run = run + 1 if h < share * entropy[0] else 0
        if run == patience:
            return i
    return None


def _group_advantages(rewards: Tensor, group: int, eps: float = 1e-4) -> Tensor:
    """(n,) → advantages (n,): minus the group's mean, by its standard deviation + eps."""
    r = rewards.view(-1, group)
    return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + eps)).flatten()


reference = SimpleNamespace(
    group_advantages=_group_advantages,
    clipped_surrogate=objective.clipped_surrogate,
    kl_k3=objective.kl_k3,
    completion_logprobs=_completion_logprobs,
    masked_mean=objective.masked_mean,
    stop_at=_stop_at,
)


def _near(out: Tensor, other: Tensor) -> bool:
    return out.shape == other.shape and torch.allclose(
        out.float(), other.float(), atol=1e-4, rtol=1e-4
    )


def _learns(out: Tensor, x: Tensor, right: Tensor, where: str) -> None:
    """A loss must reach `x`: its gradient is that of `right`."""
    sentence = f"{where} reaches no gradient: work with tensors, not with float(…) or .item()"
    expect(out.requires_grad, sentence)
    got, want = (torch.autograd.grad(v.sum(), x)[0] for v in (out, right))
    expect(_near(got, want), sentence)


@check
def group_advantages(student) -> None:
    """(rewards (n,), group, eps) → advantages (n,)."""
    rewards, eps = torch.tensor([0.2, 0.6, 1.0, 0.6, 2.0, 3.0, 2.5, 2.9]), 1e-4
    r = rewards.view(2, 4)
    centered, std = r - r.mean(1, keepdim=True), r.std(1, keepdim=True)
    out = student(rewards, 4, eps)
    expect(isinstance(out, Tensor), f"return a tensor, not {type(out).__name__}")
    expect(
        tuple(out.shape) != (2, 4),
        "that is one row a group: flatten it again, one advantage for each completion in its "
        "old place",
    )
    expect_shape(out, (8,), "one advantage a completion")
    same = student(torch.tensor([0.5, 0.5, 0.5]), 3, eps)
    expect(
        bool(same.isfinite().all()),
        "a group whose rewards are all equal gives 0/0: add eps to the standard deviation",
    )
    right = (centered / (std + eps)).flatten()
    flat = rewards - rewards.mean()
    columns = rewards.view(4, 2)
    mixed = ((columns - columns.mean(0)) / (columns.std(0) + eps)).flatten()
    population = (centered / (r.std(1, keepdim=True, correction=0) + eps)).flatten()
    if not _near(out, right):
        expect(
            not _near(out, centered.flatten()),
            "you forgot to divide by the group's standard deviation",
        )
        expect(
            not _near(out, population),
            "you divided by the population's standard deviation (n below the line): TRL takes "
            "the sample's, n - 1, as torch's std does",
        )
        expect(
            not _near(out, (centered / (std**2 + eps)).flatten()),
            "you divided by the variance: take its root, the standard deviation",
        )
        expect(
            not _near(out, flat / (rewards.std() + eps)) and not _near(out, flat),
            "you took the mean of all rewards: each group has a mean and a spread of its own",
        )
        expect(
            not _near(out, mixed),
            "your groups are mixed up: the members of a group are adjacent, so it is view(-1, "
            "group)",
        )
        expect(
            not _near(out, -right),
            "the sign is wrong: a better reward than the group's mean has a positive advantage",
        )
        expect(
            not _near(out, (r / (std + eps)).flatten()),
            "you forgot to subtract the group's mean: that mean is the baseline",
        )
        raise Mistake(
            f"for rewards {rewards.tolist()} in groups of 4, the first advantage is "
            f"{right[0]:.4f}, yours is {float(out[0]):.4f}"
        )
    expect(
        bool((same.abs() < 1e-3).all()),
        "a group whose rewards are all equal must get advantages of 0",
    )
    tiny = torch.tensor([0.5, 0.5001])
    for given in (eps, 10 * eps):
        value, want = (float(f(tiny, 2, given)[1]) for f in (student, _group_advantages))
        expect(
            abs(value - want) < 0.02,
            f"eps is added to the standard deviation, outside any root, as it is given: rewards "
            f"0.5 and 0.5001 with eps {given:g} give {want:.2f}, yours {value:.2f}",
        )


@check
def clipped_surrogate(student) -> None:
    """(logp, old (b, n), advantages (b,), epsilon) → (b, n), to be maximised."""
    ratio = torch.tensor([[1.5, 1.0, 0.5, 1.1], [1.5, 1.0, 0.5, 0.9], [1.3, 0.7, 1.05, 2.0]])
    old = torch.tensor([-1.0, -2.0, -0.5, -3.0]).expand(3, 4)
    logp, advantages, e = old + ratio.log(), torch.tensor([1.0, -1.0, 2.0]), 0.2
    a = advantages[:, None]
    right = objective.clipped_surrogate(logp, old, advantages, e)
    try:
        out = student(logp, old, advantages, e)
    except RuntimeError as error:
        if "size" in str(error):
            raise Mistake(
                "advantages (b,) and tokens (b, n) do not fit together: every token of a chain "
                "has its advantage, advantages[:, None]"
            ) from error
        raise
    expect_shape(out, (3, 4), "one number a token")
    if not _near(out, right):
        clipped = ratio.clamp(1 - e, 1 + e)
        expect(
            not _near(out, -right),
            "the sign is wrong: this is the objective, which is maximised; the loss takes the "
            "minus",
        )
        expect(
            not _near(out, ratio * a),
            "nothing is clipped: take the minimum with the product of the clipped ratio",
        )
        expect(
            not _near(out, clipped * a),
            "you always clip: take the minimum of the plain and the clipped product, so that a "
            "token that moved the wrong way can come back",
        )
        expect(
            not _near(out, torch.maximum(ratio * a, clipped * a)),
            "you took the maximum: the minimum makes it a pessimistic bound",
        )
        difference = logp - old
        expect(
            not _near(out, torch.minimum(difference * a, difference.clamp(1 - e, 1 + e) * a)),
            "you took the difference of log-probabilities as the ratio: the ratio is its "
            "exponential",
        )
        inverse = 1 / ratio
        expect(
            not _near(out, torch.minimum(inverse * a, inverse.clamp(1 - e, 1 + e) * a)),
            "your ratio is upside down: new over old is exp(logp - old)",
        )
        expect(
            not _near(out, torch.minimum(ratio * a, (ratio * a).clamp(1 - e, 1 + e))),
            "you clipped the product: clip the ratio, then multiply by the advantage",
        )
        raise Mistake(
            f"for ratios 1.5, 1, 0.5, 1.1 and advantage 1 it is {right[0].tolist()}, yours is "
            f"{[round(x, 3) for x in out[0].tolist()]}"
        )
    other = student(logp, old, advantages, 0.1)
    expect(
        _near(other, objective.clipped_surrogate(logp, old, advantages, 0.1)),
        "your clipping ignores epsilon: use the parameter, not 0.2",
    )
    x = old.clone().requires_grad_()
    student(x, old, advantages, e).sum().backward()
    expect(
        x.grad is not None and bool((x.grad != 0).all()),
        "no gradient arrives at logp where the ratio is 1: do not detach it, the derivative of "
        "the ratio is what we want",
    )


@check
def kl_k3(student) -> None:
    """(logp, ref) of any equal shape → k3 of the same shape."""
    logp = torch.tensor([[-1.0, -2.0, -0.3], [-4.0, -0.1, -1.5]])
    ref = torch.tensor([[-1.0, -1.0, -1.3], [-2.5, -0.6, -1.4]])
    x = ref - logp
    right = torch.exp(x) - x - 1
    out = student(logp, ref)
    expect(isinstance(out, Tensor), f"return a tensor, not {type(out).__name__}")
    expect(
        out.dim() > 0, "that is one number: keep the shape, the mean over free tokens comes later"
    )
    expect_shape(out, (2, 3), "one number a token")
    if _near(out, right):
        x = logp.clone().requires_grad_()
        _learns(student(x, ref), x, torch.exp(ref - x) - (ref - x) - 1, "the policy's logp")
        return
    expect(
        not _near(out, torch.exp(-x) + x - 1),
        "the two are swapped: the exponent is ref - logp, because the tokens were drawn from the "
        "policy",
    )
    expect(
        not _near(out, -x),
        "that is k1, logp - ref: right on average, but of either sign and noisy; k3 adds "
        "exp(ref - logp) - 1",
    )
    expect(not _near(out, x), "that is ref - logp, minus k1: wrong in sign and noisy")
    expect(
        not _near(out, x**2 / 2),
        "that is k2, half the square: near k3 for small differences, but biased",
    )
    expect(not _near(out, torch.exp(x) - x), "you forgot the - 1: where both agree, k3 must be 0")
    expect(
        not _near(out, torch.exp(x) + x - 1),
        "the middle term has the wrong sign: exp(x) - x - 1 is never negative, yours can be",
    )
    expect(
        not _near(out, torch.exp(x) - 1),
        "the linear term is missing: exp(x) - 1 alone is 0 on average, whatever the KL",
    )
    expect(not _near(out, -right), "the sign is wrong: k3 is never negative")
    p, q = logp.exp(), ref.exp()
    expect(
        not _near(out, p * (logp - ref)),
        "you weighted by the probability: the tokens were drawn with it already",
    )
    expect(
        not _near(out, torch.exp(q - p) - (q - p) - 1),
        "you took probabilities: the difference is one of log-probabilities",
    )
    raise Mistake(
        f"for logp -2 and ref -1 it is {float(right[0, 1]):.4f}, yours is {float(out[0, 1]):.4f}"
    )


@check
def completion_logprobs(student) -> None:
    """(logits (b, p + n, v), ids (b, p + n), p) → (b, n)."""
    g = torch.Generator().manual_seed(0)
    b, length, v, p = 2, 7, 5, 3
    logits = 2 * torch.randn(b, length, v, generator=g)
    ids = torch.randint(0, v, (b, length), generator=g)
    logp = logits.log_softmax(-1)

    def pick(table: Tensor, offset: int) -> Tensor:
        """The completion's tokens, each looked up `offset` positions before its own."""
        rows = range(p, min(length, length + offset))
        return torch.stack([table[:, i - offset].gather(1, ids[:, i, None])[:, 0] for i in rows], 1)

    right = pick(logp, 1)
    try:
        out = student(logits, ids, p)
    except RuntimeError as e:
        if "gather" in str(e) or "dimension" in str(e) or "size" in str(e).lower():
            raise Mistake(
                f"the shapes do not meet: gather needs an index with as many axes as its table, "
                f"so ids[..., None] ({e})"
            ) from e
        raise
    expect(isinstance(out, Tensor), f"return a tensor, not {type(out).__name__}")
    expect(
        tuple(out.shape) != (b,),
        "that is one number a chain: keep one for each token, the ratio is taken token by token",
    )
    expect(
        tuple(out.shape) not in ((b, length), (b, length - 1)),
        "the prompt is in it: it was given, not chosen; keep the tokens from `prompt` on",
    )
    expect(
        tuple(out.shape) != (b, length - p - 1),
        "the first token of the completion is missing: the last position of the prompt predicts it",
    )
    expect(
        tuple(out.shape) != (b, length - p, 1),
        "one axis too many is left: take [..., 0] after gather",
    )
    expect_shape(out, (b, length - p), "one number a completion token")
    if _near(out, right):
        expect(
            _near(student(logits, ids, 2), _completion_logprobs(logits, ids, 2)),
            "right for a prompt of 3 tokens only: use the length that is given",
        )
        x = logits.clone().requires_grad_()
        _learns(student(x, ids, p), x, _completion_logprobs(x, ids, p), "the logits")
        return
    expect(
        not _near(out, pick(logp, 0)),
        "you forgot to shift by one: the logits at position i are about token i + 1",
    )
    expect(
        not _near(out, pick(logits, 1)), "you forgot log_softmax: logits are not log-probabilities"
    )
    expect(not _near(out, right.exp()), "these are probabilities: leave them as logarithms")
    expect(
        not _near(out, -right),
        "the sign is wrong: a log-probability is negative (its negative is the loss)",
    )
    other = logits.log_softmax(1)
    expect(
        not _near(out, pick(other, 1)),
        "your softmax runs over the positions: it must run over the vocabulary, the last axis",
    )
    expect(
        not _near(out, logp[:, p - 1 : -1].max(-1).values),
        "that is the best token at each place: look up the token that was said, with gather",
    )
    raise Mistake(
        f"for a small random example {[round(x, 3) for x in right[0].tolist()]} is right, yours "
        f"is {[round(x, 3) for x in out[0].tolist()]}"
    )


@check
def masked_mean(student) -> None:
    """(x, mask (b, n)) → scalar."""
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]])
    out = student(x, mask)
    expect(isinstance(out, Tensor), f"return a tensor, not {type(out).__name__}")
    expect(
        tuple(out.shape) != (2,), "that is one number a chain: take the mean over the chains, too"
    )
    expect(out.dim() == 0, "return one number, a tensor without axes")
    value, per_chain = float(out), (8 / 3, 30.0)
    if abs(value - sum(per_chain) / 2) > 1e-4:
        expect(
            abs(value - 110 / 8) > 1e-4, "the mask has no effect: forced tokens are in your mean"
        )
        expect(
            abs(value - 38 / 8) > 1e-4,
            "masked tokens are 0, but you divide by all of them: divide by the sum of the mask",
        )
        expect(
            abs(value - 38 / 4) > 1e-4,
            "you averaged over all free tokens of the batch: that is another loss (TRL's bnpo), "
            "in which long chains weigh more; first each chain, then the chains",
        )
        expect(
            abs(value - 38) > 1e-4, "that is a sum: divide by the sum of the mask, chain by chain"
        )
        expect(
            abs(value - (8 / 3 + 30)) > 1e-4,
            "you summed over the chains: take their mean, or the step grows with the batch",
        )
        expect(
            abs(value - 38 / 2) > 1e-4,
            "you divided by the chains only: each chain is first a mean over its free tokens",
        )
        inverse = (2 / 1 + 70 / 3) / 2
        expect(
            abs(value - inverse) > 1e-4,
            "the mask is the wrong way round: 1 marks the tokens that count",
        )
        expect(
            abs(value + sum(per_chain) / 2) > 1e-4,
            "the sign is wrong: this is only a mean; the minus of the loss comes elsewhere",
        )
        raise Mistake(f"expected (8/3 + 30)/2 = {sum(per_chain) / 2:.4f}, got {value:.4f}")
    empty = student(x, torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))
    expect(
        bool(empty.isfinite()),
        "a chain without any free token gives 0/0: clamp the divisor to at least 1",
    )
    expect(
        abs(float(empty) - 1.25) < 1e-4,
        "a chain without any free token counts as 0 among the chains, as in TRL",
    )
    free = x.clone().requires_grad_()
    _learns(student(free, mask), free, objective.masked_mean(free, mask), "x")


@check
def stop_at(student) -> None:
    """(entropy list, share, patience) → index or None."""
    dips = [4.0, 3.0, 1.5, 2.5, 1.9, 1.0, 0.5, 0.2]  # under 2.0 at 2, then at 4, 5, 6, 7
    out = student(dips, 0.5, 2)
    if out != 5:
        expect(
            out != 4 or student([4.0, 1.0, 3.0, 1.0], 0.5, 2) is None,
            "the steps must be in a row: start counting anew when the entropy recovers",
        )
        expect(
            out != 4,
            "that is where the low run begins: report the step at which it has lasted "
            "`patience` steps",
        )
        expect(
            out != 2,
            "you stop at the first low step: wait until `patience` low steps came in a row, one "
            "dip may be chance",
        )
        expect(
            out != 6,
            "you are one step late: count steps from 0, and the low step at hand is part of the "
            "run",
        )
        expect(
            out is not None,
            "you never stop: compare with share times the entropy of step 0, not with share itself",
        )
        raise Mistake(
            f"entropy {dips}, share 0.5, patience 2: the answer is step 5, yours is {out}"
        )
    calm = [4.0, 3.9, 3.5, 3.0]
    expect(
        student(calm, 0.5, 2) is None,
        f"a run that stays calm must give None, yours gives {student(calm, 0.5, 2)}",
    )
    expect(
        student([4.0, 2.0, 2.0], 0.5, 2) is None, "exactly half is not under half: compare with <"
    )
    expect(
        student([2.0, 6.0, 2.5, 2.5, 0.9, 0.9], 0.5, 2) == 5,
        "compare with the entropy of step 0, not with the largest or the one before",
    )
    expect(student(dips, 0.5, 3) == 6, "your rule ignores patience: with 3 the answer is step 6")
    expect(
        student(dips, 0.9, 1) == 1,
        "your rule ignores share: with share 0.9 and patience 1 the answer is step 1",
    )

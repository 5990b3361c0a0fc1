"""The checks of the GRPO lesson: what is right passes, and each typical mistake is named."""

import re
from pathlib import Path

import pytest
import torch

from realsr_r1.course import notebooks as course
from realsr_r1.course.checks import grpo as checks

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "05_vlcot_grpo.ipynb"
right = checks.reference


def advantages(
    scale=lambda r: r.std(1, keepdim=True), eps=True, center=True, columns=False, sign=1.0
):
    def of(rewards, group, epsilon=1e-4):
        r = rewards.view(group, -1).T if columns else rewards.view(-1, group)
        out = sign * (r - r.mean(1, keepdim=True) * center) / (scale(r) + epsilon * eps)
        return (out.T if columns else out).flatten()

    return of


def surrogate(ratio=lambda logp, old: (logp - old).exp(), pick=torch.minimum, sign=1.0):
    def of(logp, old, a, epsilon=0.2):
        rho, a = ratio(logp, old), a[:, None]
        return sign * pick(rho * a, rho.clamp(1 - epsilon, 1 + epsilon) * a)

    return of


def clip_of_the_product(logp, old, a, epsilon=0.2):
    product = (logp - old).exp() * a[:, None]
    return torch.minimum(product, product.clamp(1 - epsilon, 1 + epsilon))


def logprobs(shift=1, first=0, raw=False, how=lambda x: x, dim=-1, start=None):
    def of(logits, ids, prompt):
        at = prompt + first if start is None else start
        table = logits if raw else logits.log_softmax(dim)
        return how(
            table[:, at - shift : ids.shape[1] - shift].gather(-1, ids[:, at:, None])[..., 0]
        )

    return of


def not_in_a_row(entropy, share=0.5, patience=2):
    low = [i for i, h in enumerate(entropy) if h < share * entropy[0]]
    return low[patience - 1] if len(low) >= patience else None


def stop(start=lambda e: e[0], first=False, strict=True, late=0, never=None, fixed=None):
    def of(entropy, share=0.5, patience=2):
        run, patience = 0, fixed or patience
        for i, h in enumerate(entropy):
            bound = share * start(entropy)
            run = run + 1 if (h < bound if strict else h <= bound) else 0
            if run == patience + late:
                return i - patience + 1 if first else i
        return never

    return of


RIGHT = [
    (checks.group_advantages, right.group_advantages),
    (checks.group_advantages, advantages()),
    (checks.clipped_surrogate, right.clipped_surrogate),
    (checks.clipped_surrogate, surrogate()),
    (checks.kl_k3, right.kl_k3),
    (checks.kl_k3, lambda logp, ref: torch.expm1(ref - logp) + logp - ref),
    (checks.completion_logprobs, right.completion_logprobs),
    (checks.completion_logprobs, logprobs()),
    (checks.masked_mean, right.masked_mean),
    (
        checks.masked_mean,
        lambda x, m: torch.stack(
            [row[k.bool()].sum() / max(1, int(k.sum())) for row, k in zip(x, m, strict=True)]
        ).mean(),
    ),
    (checks.stop_at, right.stop_at),
    (checks.stop_at, stop()),
]

WRONG = [
    (
        checks.group_advantages,
        advantages(lambda r: torch.ones(len(r), 1), eps=False),
        "forgot to divide by the group's standard deviation",
    ),
    (
        checks.group_advantages,
        advantages(lambda r: r.std(1, keepdim=True, correction=0)),
        "population's standard deviation",
    ),
    (
        checks.group_advantages,
        advantages(lambda r: r.var(1, keepdim=True)),
        "divided by the variance",
    ),
    (checks.group_advantages, advantages(eps=False), "0/0: add eps"),
    (
        checks.group_advantages,
        advantages(lambda r: (r.var(1, keepdim=True) + 1e-4).sqrt(), eps=False),
        "outside any root",
    ),
    (
        checks.group_advantages,
        lambda r, g, eps=1e-4: (r - r.mean()) / (r.std() + eps),
        "mean of all rewards",
    ),
    (checks.group_advantages, advantages(columns=True), "groups are mixed up"),
    (checks.group_advantages, advantages(sign=-1.0), "sign is wrong"),
    (checks.group_advantages, advantages(center=False), "subtract the group's mean"),
    (
        checks.group_advantages,
        lambda r, g, eps=1e-4: right.group_advantages(r, g, eps).view(-1, g),
        "flatten it again",
    ),
    (checks.clipped_surrogate, surrogate(sign=-1.0), "sign is wrong"),
    (checks.clipped_surrogate, surrogate(pick=torch.maximum), "took the maximum"),
    (checks.clipped_surrogate, surrogate(pick=lambda a, b: a), "nothing is clipped"),
    (checks.clipped_surrogate, surrogate(pick=lambda a, b: b), "always clip"),
    (
        checks.clipped_surrogate,
        surrogate(lambda logp, old: logp - old),
        "the ratio is its exponential",
    ),
    (checks.clipped_surrogate, surrogate(lambda logp, old: (old - logp).exp()), "upside down"),
    (
        checks.clipped_surrogate,
        surrogate(lambda logp, old: (logp.detach() - old).exp() + 0 * logp),
        "do not detach",
    ),
    (checks.clipped_surrogate, clip_of_the_product, "clipped the product"),
    (
        checks.clipped_surrogate,
        lambda logp, old, a, epsilon=0.2: right.clipped_surrogate(logp, old, a),
        "ignores epsilon",
    ),
    (
        checks.clipped_surrogate,
        lambda logp, old, a, epsilon=0.2: (logp - old).exp() * a,
        "do not fit together",
    ),
    (checks.kl_k3, lambda logp, ref: right.kl_k3(ref, logp), "swapped"),
    (checks.kl_k3, lambda logp, ref: logp - ref, "that is k1"),
    (checks.kl_k3, lambda logp, ref: (logp - ref) ** 2 / 2, "that is k2"),
    (checks.kl_k3, lambda logp, ref: right.kl_k3(logp, ref) + 1, "forgot the - 1"),
    (
        checks.kl_k3,
        lambda logp, ref: torch.exp(ref - logp) + (ref - logp) - 1,
        "middle term has the wrong sign",
    ),
    (checks.kl_k3, lambda logp, ref: right.kl_k3(logp, ref).mean(), "keep the shape"),
    (checks.kl_k3, lambda logp, ref: logp.exp() * (logp - ref), "weighted by the probability"),
    (checks.completion_logprobs, logprobs(shift=0), "forgot to shift by one"),
    (checks.completion_logprobs, logprobs(raw=True), "forgot log_softmax"),
    (checks.completion_logprobs, logprobs(how=lambda x: x.sum(1)), "one number a chain"),
    (checks.completion_logprobs, logprobs(start=1), "the prompt is in it"),
    (checks.completion_logprobs, logprobs(first=1), "first token of the completion is missing"),
    (checks.completion_logprobs, logprobs(how=torch.exp), "these are probabilities"),
    (checks.completion_logprobs, logprobs(dim=1), "runs over the positions"),
    (
        checks.completion_logprobs,
        lambda logits, ids, p: logits.log_softmax(-1)[:, p - 1 : -1].gather(-1, ids[:, p:]),
        "the shapes do not meet",
    ),
    (
        checks.completion_logprobs,
        lambda logits, ids, p: logits.log_softmax(-1)[:, p - 1 : -1].max(-1).values,
        "best token at each place",
    ),
    (checks.masked_mean, lambda x, m: x.mean(), "the mask has no effect"),
    (checks.masked_mean, lambda x, m: right.masked_mean(x.detach(), m), "reaches no gradient"),
    (checks.kl_k3, lambda logp, ref: right.kl_k3(logp.detach(), ref), "reaches no gradient"),
    (
        checks.completion_logprobs,
        lambda x, ids, p: right.completion_logprobs(x, ids, 3),
        "a prompt of 3 tokens only",
    ),
    (
        checks.group_advantages,
        lambda r, g, eps=1e-4: right.group_advantages(r, g, 1e-4),
        "as it is given",
    ),
    (checks.masked_mean, lambda x, m: (x * m).mean(), "you divide by all of them"),
    (checks.masked_mean, lambda x, m: (x * m).sum() / m.sum(), "long chains weigh more"),
    (checks.masked_mean, lambda x, m: (x * m).sum(), "that is a sum"),
    (checks.masked_mean, lambda x, m: (x * m).sum(1) / m.sum(1), "one number a chain"),
    (checks.masked_mean, lambda x, m: ((x * m).sum(1) / m.sum(1)).sum(), "summed over the chains"),
    (checks.masked_mean, lambda x, m: right.masked_mean(x, 1 - m), "wrong way round"),
    (checks.masked_mean, lambda x, m: ((x * m).sum(1) / m.sum(1)).mean(), "0/0: clamp"),
    (checks.stop_at, not_in_a_row, "must be in a row"),
    (checks.stop_at, stop(first=True), "low run begins"),
    (checks.stop_at, stop(fixed=1), "first low step"),
    (checks.stop_at, stop(late=1), "one step late"),
    (checks.stop_at, stop(start=lambda e: 0.1), "you never stop"),
    (checks.stop_at, stop(never=-1), "must give None"),
    (checks.stop_at, stop(strict=False), "exactly half is not under half"),
    (checks.stop_at, stop(start=max), "not with the largest"),
    (checks.stop_at, stop(fixed=2), "ignores patience"),
]


@pytest.mark.parametrize(("check", "student"), RIGHT)
def test_right_functions_pass(check, student, capsys):
    said = check(student), capsys.readouterr().out
    assert said[0], said[1]


@pytest.mark.parametrize(
    ("check", "student", "words"), WRONG, ids=[f"{c.__name__}: {w}" for c, _, w in WRONG]
)
def test_each_mistake_is_named(check, student, words, capsys):
    assert not check(student)
    said = capsys.readouterr().out
    assert words in said, said


@pytest.mark.parametrize("name", vars(right))
def test_an_empty_stub_and_a_broken_one(name, capsys):
    def stub(*_):
        raise NotImplementedError

    def broken(*_):
        return 1 / 0

    check = getattr(checks, name)
    assert not check(stub) and "not written yet" in capsys.readouterr().out
    assert not check(broken) and "ZeroDivisionError" in capsys.readouterr().out


def test_the_notebooks_solutions_pass_their_checks(capsys):
    exercises = course.exercises(course.read(NOTEBOOK))
    assert [e.name for e in exercises] == list(vars(right))
    for e in exercises:
        space = {"torch": torch, "Tensor": torch.Tensor}
        exec(e.solution, space)
        assert getattr(checks, e.name)(space[e.name]), capsys.readouterr().out
        assert re.search(r"raise NotImplementedError\s*$", e.stub)

"""The checks of the chain lesson: what is right passes, and each typical mistake is named."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from realsr_r1 import sampling
from realsr_r1.course.checks import chain as checks

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "03_vlcot_sft.ipynb"


def right_labels(ids, prompt, pad=0):
    out = ids.clone()
    out[:, :prompt] = -100
    out[ids == pad] = -100
    return out


def labels_in_place(ids, prompt, pad=0):
    ids[:, :prompt] = -100
    ids[ids == pad] = -100
    return ids


def labels_with_padding(ids, prompt, pad=0):
    out = ids.clone()
    out[:, :prompt] = -100
    return out


def labels_without_end(ids, prompt, pad=0):
    out = right_labels(ids, prompt, pad)
    out[ids == 1] = -100
    return out


def labels_shifted(ids, prompt, pad=0):
    return torch.roll(right_labels(ids, prompt, pad), -1, 1)


def ce(logits, target, weights, mean=lambda loss, w: (loss * w).sum() / w.sum()):
    keep = target != -100
    return mean(
        F.cross_entropy(logits[keep], target[keep], reduction="none"), weights[target[keep]]
    )


def right_parent(r, c, fine, coarse):
    return (r * coarse // fine) * coarse + c * coarse // fine


def logprob(first=0, shift=1, raw=False, how=torch.sum):
    def of(logits, ids, prompt):
        table = logits if raw else logits.log_softmax(-1)
        words = ids[:, prompt + first :]
        at = table[:, prompt + first - shift : ids.shape[1] - shift]
        return how(at.gather(-1, words[..., None])[..., 0], dim=1)

    return of


def logprob_backwards(logits, ids, prompt):
    logp = logits[:, prompt + 1 :].log_softmax(-1)
    return logp.gather(-1, ids[:, prompt:-1, None])[..., 0].sum(1)


def logprob_all(logits, ids, prompt):
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].sum(1)


def entropy_k(base=1.0, sign=1.0, slope=1.0, clamp=10.0, safe=True, whole=True, dim=-1):
    def of(logits):
        logp = logits.log_softmax(dim)
        h = -sign * (logp.exp() * (logp.nan_to_num(neginf=0.0) if safe else logp)).sum(-1) / base
        k = 1 + 1999 * torch.sigmoid(slope * (h.clamp(max=clamp) - 5))
        return k.round().long() if whole else k

    return of


RIGHT = [
    (checks.labels, right_labels),
    (checks.weighted_cross_entropy, checks.reference.weighted_cross_entropy),
    (checks.weighted_cross_entropy, ce),
    (checks.parent, right_parent),
    (checks.parent, checks.reference.parent),
    (checks.sequence_logprob, logprob()),
    (checks.entropy_top_k, sampling.entropy_top_k),
    (checks.entropy_top_k, entropy_k()),
]

WRONG = [
    (checks.labels, lambda ids, prompt, pad=0: ids.clone(), "train on the prompt"),
    (checks.labels, labels_with_padding, "train on the padding"),
    (checks.labels, labels_in_place, "changed the ids themselves"),
    (checks.labels, labels_without_end, "masked the end token"),
    (checks.labels, labels_shifted, "shifted the labels"),
    (
        checks.labels,
        lambda ids, prompt, pad=0: right_labels(ids, prompt + 1, pad),
        "first token of the completion is masked",
    ),
    (
        checks.labels,
        lambda ids, prompt, pad=0: right_labels(ids, prompt - 1, pad),
        "last token of the prompt is not masked",
    ),
    (
        checks.labels,
        lambda ids, prompt, pad=0: right_labels(ids, prompt, pad)[:, prompt:],
        "one label a token",
    ),
    (
        checks.weighted_cross_entropy,
        lambda x, t, w: ce(x, t, w, lambda loss, w: (loss * w).mean()),
        "divided by the number of tokens",
    ),
    (
        checks.weighted_cross_entropy,
        lambda x, t, w: ce(x, t, w, lambda loss, w: (loss * w).sum()),
        "did not divide",
    ),
    (
        checks.weighted_cross_entropy,
        lambda x, t, w: ce(x, t, w, lambda loss, w: loss.mean()),
        "weights have no effect",
    ),
    (
        checks.weighted_cross_entropy,
        lambda x, t, w: ce(x, t, w, lambda loss, _: (loss * w[t[t >= 0]]).sum() / w.sum()),
        "whole weight table",
    ),
    (checks.weighted_cross_entropy, lambda x, t, w: ce(x.softmax(-1), t, w), "softmax twice"),
    (
        checks.weighted_cross_entropy,
        lambda x, t, w: (
            F.cross_entropy(x, t, reduction="none", ignore_index=-100) * w[t.clamp(min=0)]
        ).mean(),
        "all positions",
    ),
    (
        checks.weighted_cross_entropy,
        lambda x, t, w: F.cross_entropy(x, t, reduction="none") * w[t],
        "leave those positions out first",
    ),
    (checks.parent, lambda r, c, f, k: right_parent(c, r, f, k), "swapped row and column"),
    (checks.parent, lambda r, c, f, k: (r * k // f) * f + c * k // f, "not `fine`"),
    (checks.parent, lambda r, c, f, k: r * k + c, "did not divide"),
    (checks.parent, lambda r, c, f, k: (r // 2) * k + c // 2, "always divide by 2"),
    (checks.parent, lambda r, c, f, k: right_parent(r, c, f, k) / 1, "integer"),
    (checks.parent, lambda r, c, f, k: None, "returned nothing"),
    (checks.sequence_logprob, logprob(shift=0), "forgot to shift"),
    (checks.sequence_logprob, logprob_backwards, "shifted the wrong way"),
    (checks.sequence_logprob, logprob_all, "the prompt is in your sum"),
    (checks.sequence_logprob, logprob(first=1), "first token of the completion is missing"),
    (checks.sequence_logprob, logprob(first=-1), "last token of the prompt is in your sum"),
    (checks.sequence_logprob, logprob(how=torch.mean), "you took the mean"),
    (checks.sequence_logprob, logprob(raw=True), "forgot log_softmax"),
    (checks.sequence_logprob, lambda x, i, p: -logprob()(x, i, p), "sign is wrong"),
    (checks.sequence_logprob, lambda x, i, p: logprob()(x, i, p).sum(), "for each row"),
    (checks.entropy_top_k, entropy_k(base=0.6931472), "in bits"),
    (checks.entropy_top_k, entropy_k(sign=-1.0), "negative"),
    (checks.entropy_top_k, entropy_k(slope=-1.0), "must grow with the entropy"),
    (checks.entropy_top_k, entropy_k(safe=False), "nan"),
    (checks.entropy_top_k, entropy_k(clamp=99.0), "clamp the entropy"),
    (checks.entropy_top_k, entropy_k(whole=False), "round it"),
    (checks.entropy_top_k, lambda x: sampling.entropy_top_k(x) - 1, "rounded"),
    (
        checks.entropy_top_k,
        lambda x: 1 + torch.sigmoid(x.softmax(-1).log().mul(-x.softmax(-1)).sum(-1) - 5),
        "multiply the sigmoid by 1999",
    ),
]


@pytest.mark.parametrize(("check", "student"), RIGHT)
def test_a_right_answer_passes(check, student, capsys):
    assert check(student), capsys.readouterr().out


@pytest.mark.parametrize(
    ("check", "student", "words"), WRONG, ids=[f"{c.__name__}: {w}" for c, _, w in WRONG]
)
def test_a_typical_mistake_is_named(check, student, words, capsys):
    assert not check(student)
    said = capsys.readouterr().out
    assert words in said, said


def test_every_check_knows_three_mistakes_and_the_empty_stub(capsys):
    def stub(*_):
        raise NotImplementedError

    for check in {c for c, _ in RIGHT}:
        assert sum(c is check for c, _, _ in WRONG) >= 3
        assert not check(stub) and "not written yet" in capsys.readouterr().out


def test_the_notebook_s_solutions_pass(capsys):
    cells = [
        "".join(c["source"])
        for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "markdown"
    ]
    solutions = [
        m[1]
        for c in cells
        if "<summary>Solution</summary>" in c
        for m in [re.search(r"```python\n(.*?)```", c, re.DOTALL)]
    ]
    assert len(solutions) == 5
    for code in solutions:
        names = {"torch": torch, "F": F, "Tensor": torch.Tensor}
        exec(code, names)
        name = re.search(r"def (\w+)", code)[1]
        assert getattr(checks, name)(names[name]), capsys.readouterr().out

"""The checks of notebook 07 name the mistakes they know, and the right answers are the package's
own."""

import pytest
import torch

from realsr_r1.course.checks import scaling as checks
from realsr_r1.planning import budget, cost
from realsr_r1.reference import chameleon, jacobi
from realsr_r1.reference import restoring as reference

right = checks.reference
NAMES = ("chain_budget", "code_to_id", "cache_bytes", "zero_bytes", "accept_or_redraw", "grpo_cost")


def image(n, factor=8, ends=True, four=4):
    side = n // factor
    return side * (side + ends) + four


def chain(prompt=2, lr_in=0, texts=True, turn=1, **how):
    def of(lr, sentence, sides, words, factor=8):
        how_ = {"factor": factor} | how
        lr_image = image(lr, **how_)
        return prompt + sentence + lr_image * (1 - lr_in), sum(words) * texts + sum(
            image(n, **how_) for n in sides
        ) + turn + lr_image * lr_in

    return of


def swapped(*case):
    return right.chain_budget(*case)[::-1]


def in_place(codes):
    codes[codes < 8192] += 4
    codes[codes >= 8196] += 57_344
    return codes


def zero(parts=(12, 2, 2), late=0, order=1, skip=()):
    def of(n, devices, stage):
        rows = list(enumerate(parts))[::order]
        return float(
            sum(
                n * b / (devices if stage > k + late and i not in skip else 1)
                for k, (i, b) in enumerate(rows)
            )
        )

    return of


def accept(
    keep=lambda p, q, u: u * q < p,
    left=lambda p, q: (p - q).clamp(min=0),
    scale=True,
    redraw=True,
    best=False,
):
    def of(p, q, x, u, v):
        if keep(p[x], q[x], u) or not redraw:
            return x
        mass = left(p, q).cumsum(0)
        if best:
            return int(left(p, q).argmax())
        return min(3, int((mass <= v * (mass[-1] if scale else 1.0)).sum()))

    return of


def cost_of(time=1.0, group=True, gpus=1, share=-1, pay=True):
    def of(photos, epochs, g, tokens, rate, part, n, price):
        hours = (
            time
            * photos
            * epochs
            * (g if group else 1)
            * tokens
            / rate
            / n**gpus
            * part**share
            / 3600
        )
        return hours, hours * price * (n if pay else 1)

    return of


WRONG = [
    ("chain_budget", lambda *_: None, "returns nothing"),
    ("chain_budget", lambda *_: 5, "return two numbers"),
    ("chain_budget", swapped, "you swapped them"),
    ("chain_budget", chain(lr_in=1), "belongs to the prompt"),
    ("chain_budget", chain(four=0), "four tokens beside its rows"),
    ("chain_budget", chain(ends=False), "row ends"),
    ("chain_budget", chain(factor=1), "you count pixels"),
    ("chain_budget", chain(prompt=0), "two tokens stand around"),
    ("chain_budget", chain(texts=False), "texts are missing"),
    ("chain_budget", chain(turn=0), "end of the turn"),
    ("chain_budget", chain(factor=8), "use factor, not 8"),
    ("code_to_id", lambda c: c.tolist(), "return a tensor"),
    ("code_to_id", in_place, "wrote into the codes"),
    ("code_to_id", lambda c: c + 4, "one range does not do"),
    (
        "code_to_id",
        lambda c: torch.where(c < 8192, c, c - 8192 + 65_536),
        "the first code has the id 4",
    ),
    ("code_to_id", lambda c: torch.where(c < 8192, c + 4, c + 65_536), "subtract 8,192"),
    (
        "code_to_id",
        lambda c: torch.where(c < 8192, c, c + 57_344) + 4,
        "the 4 belongs to the first range",
    ),
    (
        "code_to_id",
        lambda c: torch.where(c <= 8192, c + 4, c + 57_344),
        "already belongs to the second",
    ),
    ("code_to_id", lambda c: torch.where(c < 8191, c + 4, c + 57_344), "last of the first range"),
    ("code_to_id", lambda c: right.code_to_id(c).float(), "floating type"),
    (
        "cache_bytes",
        lambda layers, h, d, t, c, w=2: layers * h * d * t * c * w,
        "a key and a value",
    ),
    ("cache_bytes", lambda layers, h, d, t, c, w=2: 2 * h * d * t * c * w, "every layer"),
    (
        "cache_bytes",
        lambda layers, h, d, t, c, w=2: 2 * layers * d * t * c * w,
        "every key-value head",
    ),
    ("cache_bytes", lambda layers, h, d, t, c, w=2: 2 * layers * h * t * c * w, "a whole vector"),
    (
        "cache_bytes",
        lambda layers, h, d, t, c, w=2: 2 * layers * h * d * t * w,
        "that is one chain",
    ),
    (
        "cache_bytes",
        lambda layers, h, d, t, c, w=2: 2 * layers * h * d * t * t * c * w,
        "not with their square",
    ),
    (
        "cache_bytes",
        lambda layers, h, d, t, c, w=2: 16 * layers * h * d * t * c * w,
        "those are bits",
    ),
    (
        "cache_bytes",
        lambda layers, h, d, t, c, w=2: 2 * layers * h * d * t * c,
        "you count no bytes",
    ),
    ("cache_bytes", lambda layers, h, d, t, c, w=2: 4 * layers * h * d * t * c, "has no effect"),
    ("zero_bytes", zero(parts=(8, 2, 2)), "left out the float32 copy"),
    ("zero_bytes", lambda n, d, s: zero()(n, 1 if d == 1 else 8, s), "use what is given"),
    ("zero_bytes", zero(parts=(4, 2, 2)), "12 bytes a parameter"),
    ("zero_bytes", zero(late=-9), "nothing is divided"),
    ("zero_bytes", zero(skip=(2,)), "still whole"),
    ("zero_bytes", zero(order=-1), "the other way round"),
    ("zero_bytes", zero(late=1), "mind > and >="),
    ("zero_bytes", zero(late=-1), "nothing is divided|stage 0 takes|one stage too far"),
    ("zero_bytes", lambda n, d, s: right.zero_bytes(n, 1 / d, s), "you multiply"),
    ("accept_or_redraw", accept(keep=lambda *_: True), "you keep every guess"),
    ("accept_or_redraw", accept(keep=lambda p, q, u: u * p < q), "upside down"),
    ("accept_or_redraw", accept(keep=lambda p, q, u: u * q >= p), "wrong way round"),
    ("accept_or_redraw", accept(left=lambda p, q: p), "draw anew from p"),
    ("accept_or_redraw", accept(scale=False), "does not sum to 1"),
    ("accept_or_redraw", accept(redraw=False), "you keep every guess"),
    ("accept_or_redraw", accept(best=True), "likeliest token"),
    ("accept_or_redraw", lambda p, q, x, u, v: float(x), "as one integer"),
    ("grpo_cost", lambda *_: 7.0, "return two numbers"),
    ("grpo_cost", cost_of(time=3600), "those are seconds"),
    ("grpo_cost", cost_of(time=60), "those are minutes"),
    ("grpo_cost", cost_of(group=False), "a whole group"),
    ("grpo_cost", cost_of(time=0.5), "multiply by the epochs"),
    ("grpo_cost", cost_of(share=0), "only a share of the step"),
    ("grpo_cost", cost_of(share=1), "divide by the share"),
    ("grpo_cost", cost_of(gpus=0), "side by side"),
    ("grpo_cost", cost_of(gpus=-1), "more GPUs make it longer"),
    ("grpo_cost", cost_of(pay=False), "every GPU is paid"),
]


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_pass(name, capsys):
    assert getattr(checks, name)(getattr(right, name))
    assert capsys.readouterr().out.startswith("✓")


@pytest.mark.parametrize(("name", "wrong", "words"), WRONG)
def test_each_mistake_is_named(name, wrong, words, capsys):
    assert not getattr(checks, name)(wrong)
    out = capsys.readouterr().out
    assert out.startswith("✗") and any(w in out for w in words.split("|")), out


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_stub_is_said_to_be_unwritten(name, capsys):
    def stub(*_):
        raise NotImplementedError

    assert not getattr(checks, name)(stub)
    assert "not written yet" in capsys.readouterr().out


def test_every_check_knows_three_mistakes():
    assert all(sum(n == name for n, *_ in WRONG) >= 3 for name in NAMES)


def test_the_right_answers_are_the_packages_own():
    layout = chameleon.Layout.of(chameleon.published_names(), 73_728)
    codes = torch.arange(16_384)
    assert torch.equal(right.code_to_id(codes), layout.code_ids)
    assert right.chain_budget(512, 0, [128], [])[0] == reference.image_tokens(512) + 2
    shape, run = cost.chameleon(), cost.Run("grpo", 5000, 6000, group=5, precision="bfloat16")
    assert right.cache_bytes(
        shape.layers, shape.kv_heads, shape.head_dim, run.length, 5
    ) == cost.cache(shape, run)
    held = cost.memory(shape, cost.Run("sft", **budget.REFERENCE, sharded=True, devices=8)).moments[
        "update"
    ]
    assert right.zero_bytes(shape.parameters, 8, 3) == pytest.approx(sum(held.values()))


def test_the_acceptance_rule_keeps_what_jacobi_keeps():
    g = torch.Generator().manual_seed(0)
    p, q = torch.rand(200, 5, generator=g), torch.rand(200, 5, generator=g)
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    for i in range(200):
        x, (u, v) = i % 5, torch.rand(2, generator=g).tolist()
        kept = jacobi._verify(torch.tensor([x]), q[i : i + 1], p[i : i + 1], torch.tensor([u]))
        assert (right.accept_or_redraw(p[i], q[i], x, u, v) == x) == bool(kept)

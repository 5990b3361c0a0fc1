"""Checks for the lesson on the paper's size: a chain's tokens, ids of codes, cache, sharded
training states, acceptance, cost."""

from types import SimpleNamespace

import torch
from torch import Tensor

from realsr_r1.course.checks import Mistake, check, expect, is_whole, number


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(1.0, abs(b))


# ---------------------------------------------------------------- right answers, with which the
# lesson goes on


def _image(pixels: int, factor: int) -> int:
    side = pixels // factor
    return side * (side + 1) + 4


def _chain_budget(
    lr_pixels: int, sentence: int, sides: list[int], texts: list[int], factor: int = 8
) -> tuple[int, int]:
    prompt = 1 + sentence + _image(lr_pixels, factor) + 1
    return prompt, sum(texts) + sum(_image(n, factor) for n in sides) + 1


def _code_to_id(codes: Tensor) -> Tensor:
    return torch.where(codes < 8192, codes + 4, codes - 8192 + 65_536)


def _cache_bytes(
    layers: int, kv_heads: int, head_dim: int, tokens: int, chains: int, width: int = 2
) -> int:
    return 2 * layers * kv_heads * head_dim * tokens * chains * width


def _zero_bytes(parameters: int, devices: int, stage: int) -> float:
    parts = (12, 2, 2)  # optimizer states, gradients, weights: in this order the stages shard them
    return sum(parameters * b / (devices if stage > i else 1) for i, b in enumerate(parts))


def _accept_or_redraw(p: Tensor, q: Tensor, x: int, u: float, v: float) -> int:
    if u * q[x] < p[x]:
        return x
    left = (p - q).clamp(min=0)
    mass = left.cumsum(0)
    return int((mass <= v * mass[-1]).sum())


def _grpo_cost(
    photos: int,
    epochs: int,
    group: int,
    tokens: int,
    rate: float,
    share: float,
    gpus: int,
    price: float,
) -> tuple[float, float]:
    hours = photos * epochs * group * tokens / (rate * gpus) / 3600 / share
    return hours, hours * gpus * price


reference = SimpleNamespace(
    chain_budget=_chain_budget,
    code_to_id=_code_to_id,
    cache_bytes=_cache_bytes,
    zero_bytes=_zero_bytes,
    accept_or_redraw=_accept_or_redraw,
    grpo_cost=_grpo_cost,
)

# ---------------------------------------------------------------- checks


@check
def chain_budget(student) -> None:
    """(LR pixels, words of the sentence, image sides, words of the texts, factor) → (prompt,
    completion) in tokens."""
    case = (512, 20, [128, 256, 512], [30, 40, 50, 60], 8)
    out = student(*case)
    expect(out is not None, "your function returns nothing: end it with return")
    expect(isinstance(out, tuple) and len(out) == 2, "return two numbers, (prompt, completion)")
    prompt, completion = (number(x, "a count of tokens") for x in out)
    images, lr, (p, c) = 276 + 1060 + 4164, 4164, _chain_budget(*case)
    expect(
        prompt != c or completion != p,
        "you swapped them: the prompt comes first, then the completion",
    )
    expect(
        completion != c + lr,
        "the LR photo belongs to the prompt, not to the completion: it is given, not written",
    )
    expect(
        prompt > 1000,
        "the prompt is too short: it holds the LR photo, enlarged, as an image of its own",
    )
    expect(
        prompt != p - 4 and completion != c - 12,
        "an image has four tokens beside its rows: start, height, width, end",
    )
    expect(
        prompt != p - 64 and completion != c - 16 - 32 - 64,
        "you forgot the row ends: every row of codes is closed by a token of its own",
    )
    expect(completion < 100_000, "you count pixels: an image has pixels // factor codes a side")
    expect(
        prompt not in (lr + 20, lr + 21),
        "two tokens stand around the prompt: one begins it and one ends the turn",
    )
    expect(
        prompt == p,
        f"the prompt has {p:,} tokens: begin, sentence, LR image, end of turn; you say "
        f"{prompt:,.0f}",
    )
    expect(completion != images + 1, "the texts are missing from the completion")
    expect(completion != c - 1, "the completion ends with a token, too: the end of the turn")
    expect(
        completion == c,
        f"the completion has {c:,} tokens: texts, images, end of turn; you say {completion:,.0f}",
    )
    expect(
        all(is_whole(x) for x in out), "a count of tokens is an integer: divide with //, not with /"
    )
    for other in ((512, 5, [512], [], 8), (256, 20, [64, 128], [3, 4, 5], 16)):
        got, right = tuple(student(*other)), _chain_budget(*other)
        expect(
            got == right or other[4] == 8,
            "with 16 pixels a code your numbers do not change as they should: use factor, not 8",
        )
        expect(
            got == right,
            f"for a direct answer of one image of 512 px, without text, {right} is right, you "
            f"say {got}",
        )


@check
def code_to_id(student) -> None:
    """Codes (any shape) in 0…16,383 → token ids of the same shape."""
    codes = torch.tensor([[0, 1, 8191], [8192, 8193, 16_383]])
    kept, right = codes.clone(), _code_to_id(codes)
    out = student(codes)
    expect(isinstance(out, Tensor), f"return a tensor, not {type(out).__name__}")
    expect(torch.equal(codes, kept), "you wrote into the codes that were given: make a new tensor")
    expect(
        out.shape == codes.shape, f"expected the shape {tuple(codes.shape)}, got {tuple(out.shape)}"
    )
    expect(not out.is_floating_point(), "ids are integers: your result is of a floating type")
    if torch.equal(out.long(), right):
        wide = torch.arange(16_384)
        expect(
            len(student(wide).unique()) == 16_384,
            "two codes share an id: each needs one of its own",
        )
        return
    low, high = out[0].tolist(), out[1].tolist()
    expect(
        high != [8196, 8197, 16_387],
        "one range does not do: ids 8,196 and up belong to other tokens, the codes from 8,192 "
        "on begin at 65,536",
    )
    expect(low != [0, 1, 8191], "the first code has the id 4: ids 0 to 3 are special tokens")
    expect(
        high != [73_728, 73_729, 81_919],
        "code 8,192 is the first of its range: subtract 8,192 before you add 65,536",
    )
    expect(
        high != [65_540, 65_541, 73_731],
        "the 4 belongs to the first range only: code 8,192 has the id 65,536 exactly",
    )
    expect(high[0] != 8196, "off by one: code 8,192 already belongs to the second range")
    expect(
        low[2] == 8195, "off by one: code 8,191 is the last of the first range and has the id 8,195"
    )
    expect(
        low == right[0].tolist() or high == right[1].tolist(),
        "the two ranges look swapped: codes below 8,192 go to 4…8,195",
    )
    raise Mistake(
        f"for the codes {codes.flatten().tolist()} the ids are {right.flatten().tolist()}, you "
        f"say {out.flatten().tolist()}"
    )


@check
def cache_bytes(student) -> None:
    """(layers, kv heads, head dimension, tokens, chains, bytes an element) → bytes of keys and
    values."""
    case = (3, 5, 7, 11, 13, 2)
    got, right = number(student(*case), "bytes"), _cache_bytes(*case)
    if got != right:
        expect(
            got != right / 2 or student(*case[:5], 4) == 2 * got,
            "you count no bytes: multiply by the bytes of an element (width)",
        )
        expect(got != right / 2, "half is missing: there is a key and a value of each token")
        expect(got != right / 3, "every layer has a cache of its own: multiply by the layers")
        expect(got != right / 5, "every key-value head keeps a vector: multiply by kv_heads")
        expect(got != right / 7, "a head keeps a whole vector: multiply by head_dim")
        expect(
            got != right / 13,
            "that is one chain: a group is sampled together, and each chain has its own cache",
        )
        expect(got != right / 11, "that is one token: the cache keeps them all")
        expect(
            got != right * 11,
            "the cache grows with the tokens, not with their square: it keeps no table of scores",
        )
        expect(got != right * 8, "those are bits: the width is already in bytes")
        raise Mistake(f"for {case} it is {right:,} bytes, you say {got:,.0f}")
    expect(
        student(*case[:5], 4) == 2 * right, "the width of an element has no effect: use it, not 2"
    )


@check
def zero_bytes(student) -> None:
    """(parameters, devices, stage 0…3) → bytes a device of weights, gradients and
    optimizer states."""
    n, d = 1_000_000, 8
    got = [number(student(n, d, s), "bytes a device") / n for s in range(4)]
    right = [_zero_bytes(n, d, s) / n for s in range(4)]
    if all(_near(a, b) for a, b in zip(got, right, strict=True)):
        expect(
            _near(number(student(n, 1, 3), "bytes"), 16.0 * n),
            "on one device there is nothing to share: 16 bytes a parameter at any stage",
        )
        more = [
            _near(number(student(3 * n, 4, s), "bytes"), _zero_bytes(3 * n, 4, s)) for s in range(4)
        ]
        expect(all(more), "right for a million weights on 8 devices only: use what is given")
        return
    expect(
        not _near(got[0], 12),
        "12 bytes a parameter are the optimizer states alone, or you left out the float32 copy "
        "of the weights: it is 2 + 2 + 12 without sharding",
    )
    expect(
        not _near(got[0], 8),
        "float32 weights and AdamW's two moments take 4 bytes each: the optimizer states are 12 "
        "bytes a parameter",
    )
    expect(
        not _near(got[0], right[3]),
        "without sharding (stage 0) every device holds everything: nothing is divided",
    )
    expect(
        _near(got[0], 16), f"stage 0 takes 2 + 2 + 12 = 16 bytes a parameter, you say {got[0]:g}"
    )
    expect(
        not (_near(got[3], 2 + 14 / d) and _near(got[1], right[1])),
        "stage 3 shards the weights as well: they are still whole in your sum",
    )
    expect(
        not _near(got[1], 14 + 2 / d),
        "the order is the other way round: stage 1 shards the optimizer states, the largest "
        "part, first",
    )
    expect(
        not _near(got[1], right[2]) or not _near(got[2], right[3]),
        "you are one stage too far: stage 1 shards the optimizer states alone",
    )
    expect(
        not _near(got[1], got[0]),
        "stage 1 shards the optimizer states: your stage 1 still holds them whole (mind > and >=)",
    )
    expect(
        not any(_near(g, 16 * d) or g > 16.1 for g in got),
        "sharding divides by the devices; you multiply",
    )
    s = next(i for i in range(4) if not _near(got[i], right[i]))
    raise Mistake(
        f"stage {s} on {d} devices takes {right[s]:g} bytes a parameter and device, you say "
        f"{got[s]:g}"
    )


@check
def accept_or_redraw(student) -> None:
    """(p (v,), q (v,), guess x, u, v in [0, 1)) → the word that is settled."""
    p, q = torch.tensor([0.5, 0.2, 0.3, 0.0]), torch.tensor([0.1, 0.6, 0.2, 0.1])
    steps = 60
    grid = [(i + 0.5) / steps for i in range(steps)]
    kept, out = torch.zeros(4), torch.zeros(4)
    for x in range(4):
        for u in grid:
            ends = [
                student(p, q, x, u, v)
                for v in ((0.1, 0.3, 0.5, 0.7, 0.9) if u * q[x] >= p[x] else (0.5,))
            ]
            expect(all(is_whole(e) for e in ends), "return the token as one integer")
            expect(all(0 <= e < 4 for e in ends), "a token is an index into p, from 0 on")
            kept[x] += sum(e == x for e in ends) / len(ends) / steps
            for e in ends:
                out[e] += q[x] / len(ends) / steps
    rate = (p / q).clamp(max=1)
    expect(
        not bool((kept > 0.999).all()),
        "you keep every guess: the result has the distribution q, not p",
    )
    # Words 1 and 3 are never drawn anew, so that their share is that of the rule alone.
    expect(
        not bool((kept[[1, 3]] > 0.97).all()),
        "the ratio is upside down: keep x with probability min(1, p(x)/q(x)), so that what p "
        "likes more than q always stands",
    )
    expect(
        not torch.allclose(kept[1:3], 1 - rate[1:3], atol=0.03),
        "the comparison is the wrong way round: keep x where u is below p(x)/q(x)",
    )
    ends = [student(p, q, 1, 0.99, v) for v in grid]
    expect(
        1 not in ends or (0 in ends and 2 in ends),
        "a refused guess must be drawn anew: you return it all the same",
    )
    share = torch.bincount(torch.tensor(ends), minlength=4) / steps
    expect(
        not torch.allclose(share, p, atol=0.03),
        "you draw anew from p: then tokens that both like come up twice; draw from the positive "
        "part of p − q",
    )
    left = (p - q).clamp(min=0)
    expect(
        not torch.allclose(share, torch.tensor([0.4, 0.0, 0.1, 0.5]), atol=0.03) and max(ends) != 3,
        "the positive part of p − q does not sum to 1: divide by its sum before you invert the "
        "distribution",
    )
    expect(
        len(set(ends)) > 1,
        "you take the likeliest token after a refusal: draw with v instead, or the distribution "
        "is not p",
    )
    expect(
        torch.allclose(share, left / left.sum(), atol=0.03),
        f"after a refusal tokens 0 and 2 come up 4 : 1, yours {share.tolist()}",
    )
    expect(
        torch.allclose(out, p, atol=0.03),
        f"over all guesses the tokens must come out as p = {p.tolist()}, yours {out.tolist()}",
    )


@check
def grpo_cost(student) -> None:
    """(photos, epochs, group, tokens, rate, share, gpus, price) → (hours, money)."""
    case = (500, 2, 5, 5600, 100.0, 0.5, 4, 3.0)
    out = student(*case)
    expect(out is not None, "your function returns nothing: end it with return")
    expect(isinstance(out, tuple) and len(out) == 2, "return two numbers, (hours, money)")
    hours, money = (number(x, "hours or money") for x in out)
    h, m = _grpo_cost(*case)
    if not _near(hours, h):
        expect(not _near(hours, h * 3600), "those are seconds: divide by 3,600")
        expect(not _near(hours, h * 60), "those are minutes: divide by 60 once more")
        expect(
            not _near(hours, h / 5),
            "every photo is answered by a whole group of chains: multiply by the group size",
        )
        expect(
            not _near(hours, h / 2),
            "an epoch visits every photo once: multiply by the epochs; and sampling is only a "
            "share of the step",
        )
        expect(
            not _near(hours, h / 4),
            "sampling is only a share of the step: divide by the share; multiplying makes the "
            "step shorter than its part",
        )
        expect(
            not _near(hours, h * 4), "the GPUs work side by side: divide the time by their number"
        )
        expect(
            not _near(hours, h * 16),
            "more GPUs make it longer in your formula: divide by their number",
        )
        raise Mistake(f"for {case} it takes {h:.2f} hours, you say {hours:.2f}")
    expect(not _near(money, m / 4), "every GPU is paid for every hour: multiply by their number")
    expect(
        _near(money, m), f"{h:.2f} hours on 4 GPUs at 3 an hour cost {m:.2f}, you say {money:.2f}"
    )
    twice = student(*case[:6], 8, 3.0)
    expect(
        _near(twice[0], h / 2) and _near(twice[1], m),
        "with twice the GPUs the time halves and the bill stays: your formula says otherwise",
    )

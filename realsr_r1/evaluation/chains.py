"""Two questions to a chain beyond its picture: is its form learnt, and do its words matter?

The grammar forces the form while sampling. How often the policy would keep it unforced needs no
unforced sample: the probability of a well-formed chain is the mean, over chains drawn under the
grammar, of the product of the probability mass that the grammar had left.
"""

from dataclasses import replace

import torch
from torch import Tensor

from realsr_r1 import perceptual, sft
from realsr_r1.common import generator
from realsr_r1.evaluation.nano import clusters_of, held_out, stacked
from realsr_r1.photographs import Photograph
from realsr_r1.pipeline import RealSR
from realsr_r1.policy import ChainPolicy
from realsr_r1.sampling import Sampling, entropy_top_k, keep_top_k
from realsr_r1.stats import clustered
from realsr_r1.vlcot import IMAGE_TAGS, PAD, TAGS, TEXT_TAGS


@torch.no_grad()
def well_formed(
    model: RealSR, lr: Tensor, sampling: Sampling = Sampling.rollout(), seed: int = 0
) -> Tensor:
    """Share of chains (b,) that would keep the form without a grammar, one estimate per LR photo
    (b, 3, 32, 32), sampled token by token as `sampling` says: at temperature 1 if left out."""
    policy, g = model.policy, torch.Generator().manual_seed(seed)
    ids = model.sample(lr, replace(sampling, lag=0), g).ids
    grammar = policy.grammar()
    prompt = torch.tensor(policy.vocabulary.prompt, device=ids.device).expand(len(ids), -1)
    whole = torch.cat([prompt, ids], 1)
    logits = policy(whole, lr.to(ids.device), logits_to_keep=ids.shape[1] + 1).logits[:, :-1]
    states = grammar.states(ids)
    inside, allowed = grammar.cell[states] >= 0, grammar.allowed(states)
    heat = torch.where(inside, sampling.image_temperature, sampling.temperature)
    scores = logits / heat[..., None]
    if sampling.entropy_top_k:
        scores[inside] = keep_top_k(scores[inside], entropy_top_k(scores[inside]))
    left = scores.masked_fill(~allowed, float("-inf"))
    mass = left.logsumexp(-1) - scores.logsumexp(-1)
    if sampling.greedy_text:
        right = allowed.gather(-1, logits.argmax(-1, keepdim=True))[..., 0]
        mass = torch.where(inside, mass, torch.where(right, 0.0, float("-inf")))
    return mass.masked_fill(ids == policy.vocabulary.ids[PAD], 0.0).sum(1).exp()


@torch.no_grad()
def chain_metrics(
    policy: ChainPolicy, ids: Tensor, lr: Tensor, seen: Tensor | None = None
) -> dict[str, Tensor]:
    """Per chain (b,): cross-entropy of each image's codes, in nats a code, and the share of words
    of each text guessed right given the true chain before them, or what is `seen` of it."""
    loss, logits, target = sft.token_losses(policy, ids, lr, seen)
    right = logits.argmax(-1) == target
    vocabulary = policy.vocabulary
    words = torch.zeros(len(vocabulary), dtype=torch.bool, device=ids.device)
    words[[vocabulary.ids[w] for w in vocabulary.text]] = True
    out = {}
    for tag in TAGS:
        opened = (target == vocabulary.ids[f"<{tag}>"]).cumsum(1)
        inside = (opened - (target == vocabulary.ids[f"</{tag}>"]).cumsum(1)) > 0
        if tag in IMAGE_TAGS:
            mask = inside & (target >= vocabulary.first_code)
            out[tag] = (loss * mask).sum(1) / mask.sum(1).clamp(min=1)
        else:
            mask = inside & words[target]
            out[tag] = (right & mask).sum(1) / mask.sum(1).clamp(min=1)
    return out


def under_texts(
    model: RealSR, lr: Tensor, texts: list[dict[str, str]], sampling: Sampling, seed: int
) -> Tensor:
    """Pictures (b, 3, 128, 128) of LR photos (b, 3, 32, 32), each drawn under given texts, a
    photo with the same noise whatever they say."""
    out = []
    for i, (x, given) in enumerate(zip(lr.split(1), texts, strict=True)):
        out.append(model.finish(model.sample(x, sampling, [generator(seed, i)], given).chains, x))
    return torch.cat(out)


def report(
    model: RealSR,
    photos: list[Photograph],
    severity: str = "medium",
    temperature: float = 0.65,
    seed: int = 0,
) -> str:
    """Lines of text: the share of well-formed chains; LPIPS of pictures drawn under the policy's
    own texts, and how much worse or better the true captions and another photograph's make it."""
    if len(photos) < 2:
        raise ValueError("one photograph has no other's text: take two or more (-n)")
    items = held_out(photos, severity, seed, labels=True)
    lr, hr = stacked(items)
    clusters = clusters_of(photos)
    sampling = Sampling(image_temperature=temperature)
    free = {
        name: torch.cat([well_formed(model, x, how, seed) for x in lr.split(48)]).cpu().numpy()
        for name, how in (("temperature 1", Sampling.rollout()), ("as restored", sampling))
    }
    g = torch.Generator().manual_seed(seed)
    chains = [c for x in lr.split(48) for c in model.sample(x, sampling, g).chains]
    own = [{t: getattr(c, t) for t in TEXT_TAGS} for c in chains]
    true = [dict(zip(TEXT_TAGS, (x["degradation"], *x["captions"]), strict=True)) for x in items]
    half = len(true) // 2  # far off: in a table sorted by kind, neighbors show the same
    far = true[half:] + true[:half]
    other = [t | {TEXT_TAGS[0]: o[TEXT_TAGS[0]]} for t, o in zip(far, own, strict=True)]
    distance = {}
    for name, texts in {"own": own, "true": true, "another photograph's": other}.items():
        made = under_texts(model, lr, texts, sampling, seed)
        distance[name] = perceptual.distance(made, hr).numpy()
    text = "well formed without the grammar"
    lines = [f"{text}, {name}: {clustered(v, clusters)}" for name, v in free.items()]
    lines.append(f"LPIPS under own texts: {clustered(distance['own'], clusters)}")
    for name in list(distance)[1:]:
        difference = clustered(distance[name] - distance["own"], clusters)
        lines.append(f"under {name} texts, minus that: {difference}")
    return "\n".join(lines)

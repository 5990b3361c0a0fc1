"""Cold start: chains as token ids, and the loss of supervised fine-tuning (paper, section 3.2).

Words are known when a pair is made, image codes once the tokenizer has seen the HR picture: so the
data loader makes chains with empty cells, and `fill` puts the codes in.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from realsr_r1 import vlcot
from realsr_r1.policy import ChainPolicy
from realsr_r1.vlcot import EOS, IMAGE_TAGS, PAD, TAGS, TEXT_TAGS, Vocabulary

Collate = Callable[[list[dict]], dict]


def chain_ids(
    vocabulary: Vocabulary,
    degradation: str,
    captions: tuple[str, str, str],
    tags: tuple[str, ...] = TAGS,
) -> list[int]:
    """Prompt and true chain of one pair as token ids, with code 0 in every cell.

    `tags` are the parts of the chain that are learnt; the final image alone is the direct variant.
    Raises ValueError for a word outside the vocabulary."""
    texts = dict(zip(TEXT_TAGS, (degradation, *captions), strict=True))
    empty = {
        t: torch.zeros(n, n, dtype=torch.long) for t, n in zip(IMAGE_TAGS, vlcot.GRIDS, strict=True)
    }
    chain = vlcot.Chain(**texts, **empty)
    return [*vocabulary.prompt, *vocabulary.encode(vlcot.render(chain, tags)), vocabulary.ids[EOS]]


def collate(vocabulary: Vocabulary, tags: tuple[str, ...] = TAGS) -> Collate:
    """Items of `photographs.Pairs` → a batch: hr, lr (uint8) and chains padded on the right."""

    def batch(items: list[dict]) -> dict:
        rows = [chain_ids(vocabulary, x["degradation"], x["captions"], tags) for x in items]
        ids = pad_sequence([torch.tensor(r) for r in rows], True, vocabulary.ids[PAD])
        out = {k: torch.stack([x[k] for x in items]) for k in ("hr", "lr")}
        return out | {"ids": ids, "index": torch.tensor([x["index"] for x in items])}

    return batch


def fill(policy: ChainPolicy, ids: Tensor, steps: list[Tensor]) -> Tensor:
    """Chains (b, n) with the codes of their images (b, g, g) of `VQModel.encode_steps` put in."""
    codes = torch.cat([s.flatten(1) for s in steps], 1) + policy.vocabulary.first_code
    cells = policy.cells(ids)[:, :-1]
    out = ids.clone()
    out[:, 1:] = torch.where(cells >= 0, codes.gather(1, cells.clamp(min=0)), ids[:, 1:])
    return out


def token_weights(vocabulary: Vocabulary, text: float = 6.0) -> Tensor:
    """Weight of each token (v,) in the loss: words, being few, count more, and padding nothing."""
    weights = torch.ones(len(vocabulary))
    weights[[vocabulary.ids[w] for w in vocabulary.text]] = text
    weights[vocabulary.ids[PAD]] = 0.0
    return weights


def token_losses(
    policy: ChainPolicy, ids: Tensor, lr: Tensor, seen: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the completion's tokens (b, m), the logits (b, m, v), the tokens (b, m).

    `ids` (b, n) with the prompt, `lr` (b, 3, 32, 32) in [0, 1]; `seen` (b, n): what the policy has
    before it where that is not the truth (see `pretraining.redraw`)."""
    prompt = len(policy.vocabulary.prompt)
    seen = ids if seen is None else seen
    logits = policy(seen, lr, logits_to_keep=ids.shape[1] - prompt + 1).logits[:, :-1]
    target = ids[:, prompt:]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
    return loss.view_as(target), logits, target


def chain_loss(
    policy: ChainPolicy, ids: Tensor, lr: Tensor, weights: Tensor, seen: Tensor | None = None
) -> Tensor:
    """Weighted mean cross-entropy of the completions; `weights` (v,) of `token_weights`."""
    loss, _, target = token_losses(policy, ids, lr, seen)
    w = weights[target]
    return (loss * w).sum() / w.sum()

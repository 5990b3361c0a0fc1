"""The same policy sampled by transformers' own `generate`: plain, and with a layout processor that
works row by row in Python.

The second works like the released code's (PURE's inference, of which RealSR-R1 uses a copy): at
every word it goes through the batch in a Python loop, counts image starts and ends in all words so
far, looks for the last start, reads the sizes after it, and builds that row's scores anew. This is
our own short version of that way, without its printing.
"""

import math

import realsr_r1  # noqa: F401  repairs torchvision's import before transformers asks for it

# isort: split
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from realsr_r1.first.vlcot import END, EOS, PAD, ROW, START, Vocabulary


class PerRowLayout(LogitsProcessor):
    """Inside images only codes, row ends after each row, and the end after the last; outside, any
    word."""

    def __init__(self, vocabulary: Vocabulary):
        ids = vocabulary.ids
        self.start, self.end, self.row = ids[START], ids[END], ids[ROW]
        self.size_of = {ids[f"<n{n}>"]: n for n in range(1, 18)}
        self.no_code = torch.ones(len(vocabulary), dtype=torch.bool)
        self.no_code[vocabulary.first_code : vocabulary.first_code + vocabulary.codes] = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Words so far (b, n) and scores (b, v) → scores (b, v), minus infinity where the layout
        forbids."""
        return torch.stack([self.one(words, s) for words, s in zip(input_ids, scores, strict=True)])

    def one(self, words: Tensor, scores: Tensor) -> Tensor:
        if (words == self.start).sum() == (words == self.end).sum():
            return scores
        inside = words[torch.where(words == self.start)[0][-1].item() + 1 :]
        if (
            len(inside) < 2
            or inside[0].item() not in self.size_of
            or inside[1].item() not in self.size_of
        ):
            return scores  # the sizes are the model's own choice
        height, width = self.size_of[inside[0].item()], self.size_of[inside[1].item()]
        placed = len(inside) - 2
        if placed == height * (width + 1):
            return self.only(self.end, scores)
        if placed % (width + 1) == width:
            return self.only(self.row, scores)
        return torch.where(self.no_code.to(scores.device), -math.inf, scores)

    def only(self, word: int, scores: Tensor) -> Tensor:
        out = torch.full_like(scores, -math.inf)
        out[word] = 0
        return out


def generate(
    model: PreTrainedModel,
    prompts: Tensor,
    new: int,
    processor: LogitsProcessor | None = None,
    seed: int = 0,
) -> Tensor:
    """Up to `new` words (b, n) after the prompts (b, p), sampled by transformers at temperature 1
    from the whole softmax."""
    ids = model.vocabulary.ids
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new,
        use_cache=True,
        pad_token_id=ids[PAD],
        eos_token_id=ids[EOS],
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=config,
            logits_processor=LogitsProcessorList([processor] if processor else []),
        )
    return out[:, prompts.shape[1] :]

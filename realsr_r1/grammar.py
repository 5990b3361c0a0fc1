"""The layout of a completion as a table: which tokens may come next."""

import torch
from torch import Tensor

from realsr_r1.vlcot import END, EOS, GRIDS, IMAGE_TAGS, PAD, START, TAGS, TEXT_TAGS, Vocabulary

MAX_WORDS = 24  # of a text part


class LayoutGrammar:
    """Every position of a completion is a state. A row's state is one integer and moves on in O(1),
    batched: state + 1, or a jump where a text part is closed early.

    In a `forced` state a single token is possible, so it carries no choice and no gradient. `cell`:
    which cell of all images, one after another, a state is about to write, -1 outside images."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        tags: tuple[str, ...] = TAGS,
        texts: dict[str, str] | None = None,
    ):
        """`tags`: the parts of the layout. `texts`: parts whose words are given, so forced."""
        self.vocabulary = vocabulary
        ids = vocabulary.ids
        text = frozenset(ids[w] for w in vocabulary.text)
        codes = frozenset(range(vocabulary.first_code, len(vocabulary)))
        allowed, cells, jumps = [], [], {}
        for tag in tags:
            close = frozenset({ids[f"</{tag}>"]})
            allowed.append(frozenset({ids[f"<{tag}>"]}))
            first = len(allowed)
            if tag in (texts or {}):
                given = vocabulary.encode(texts[tag].replace(",", " ,"))
                allowed += [*[frozenset({i}) for i in given], close]
            elif tag in TEXT_TAGS:
                allowed += [text] + [text | close] * (MAX_WORDS - 1) + [close]
                after = first + MAX_WORDS + 1
                jumps |= {s: (*close, after) for s in range(first + 1, first + MAX_WORDS)}
            else:
                level = IMAGE_TAGS.index(tag)
                n = GRIDS[level] ** 2
                allowed += [frozenset({ids[START]}), *[codes] * n, frozenset({ids[END]}), close]
                before = sum(g * g for g in GRIDS[:level])
                cells += [(first + 1 + i, before + i) for i in range(n)]
        allowed += [frozenset({ids[EOS]}), frozenset({ids[PAD]})]  # the last state repeats itself
        self._tabulate(allowed, cells, jumps)

    def _tabulate(self, allowed: list[frozenset], cells: list, jumps: dict) -> None:
        """The lists as tensors."""
        kinds = {a: i for i, a in enumerate(dict.fromkeys(allowed))}
        self.masks = torch.zeros(len(kinds), len(self.vocabulary), dtype=torch.bool)
        for tokens, i in kinds.items():
            self.masks[i, list(tokens)] = True
        n = len(allowed)
        self.kind = torch.tensor([kinds[a] for a in allowed])
        self.forced = torch.tensor([len(a) == 1 for a in allowed])
        self.run = torch.zeros(n, dtype=torch.long)  # how many states in a row are forced from here
        for i in reversed(range(n - 1)):
            self.run[i] = (self.run[i + 1] + 1) * self.forced[i]
        self.cell = torch.full((n,), -1)
        for state, cell in cells:
            self.cell[state] = cell
        self.after = (torch.arange(n) + 1).clamp(max=n - 1)
        self.closing, self.target = torch.full((n,), -1), self.after.clone()
        for state, (token, to) in jumps.items():
            self.closing[state], self.target[state] = token, to
        self.max_length = n - 1

    def to(self, device: str | torch.device) -> "LayoutGrammar":
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def start(self, batch: int) -> Tensor:
        """The states (batch,) before the first token."""
        return torch.zeros(batch, dtype=torch.long, device=self.kind.device)

    def allowed(self, state: Tensor) -> Tensor:
        """States (…) → boolean mask (…, vocabulary) of the tokens that may come next."""
        return self.masks[self.kind[state]]

    def step(self, state: Tensor, token: Tensor) -> Tensor:
        """States (b,) and the tokens (b,) just taken → next states (b,)."""
        return torch.where(token == self.closing[state], self.target[state], self.after[state])

    def states(self, completions: Tensor) -> Tensor:
        """Completions (b, n) → the state (b, n) before each token."""
        state, out = self.start(len(completions)), []
        for token in completions.unbind(1):
            out.append(state)
            state = self.step(state, token)
        return torch.stack(out, 1)

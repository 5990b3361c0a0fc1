"""The policy: one causal language model that sees the LR photo, reads and writes text and images.

The body is transformers' Qwen3 at a small size, embeddings tied. The eye's patches replace the
placeholders of the prompt, as in any vision-language model of transformers. Where a cell of an
image is predicted, the input also gets what lies at that place: the eye's map, the code of the
image before, a learnt position ("aligned inputs"). So nothing has to learn where to look.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3Config, Qwen3Model
from transformers.modeling_outputs import CausalLMOutput

from realsr_r1.eye import Eye
from realsr_r1.grammar import LayoutGrammar
from realsr_r1.tokenizer import VQModel
from realsr_r1.vlcot import GRIDS, IMAGE_TAGS, LR, PATCH_TOKENS, START, TAGS, Vocabulary

CELLS = sum(n * n for n in GRIDS)
FIRST_CELL = [sum(n * n for n in GRIDS[:i]) for i in range(len(GRIDS))]


def _parents() -> Tensor:
    """For each cell of all images the cell at its place in the image before; -1 in the first."""
    out = [torch.full((GRIDS[0] ** 2,), -1)]
    for i in range(1, len(GRIDS)):
        a, b = GRIDS[i - 1], GRIDS[i]
        place = torch.arange(b) * a // b
        out.append((FIRST_CELL[i - 1] + place[:, None] * a + place[None]).flatten())
    return torch.cat(out)


PARENTS = _parents()


class PolicyConfig(PreTrainedConfig):
    """Shape of the policy. `aligned=False` is the ablation with one-dimensional positions only;
    `words` are the caption words (None: those of the annotated photographs)."""

    model_type = "realsr_chain"
    codes: int = 2048
    words: list[str] | None = None
    hidden_size: int = 224
    layers: int = 6
    heads: int = 4
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size / heads
    mlp: int = 576
    rope_theta: float = 10_000.0
    eye_width: int = 96
    eye_blocks: int = 4
    dropout: float = 0.0
    aligned: bool = True

    @property
    def body(self) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or self.heads,
            head_dim=self.head_dim or self.hidden_size // self.heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            attention_dropout=self.dropout,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
        )

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    @property
    def vocabulary(self) -> Vocabulary:
        return _vocabulary(self.codes, tuple(self.words or ()))


@lru_cache(maxsize=8)
def _vocabulary(codes: int, words: tuple[str, ...]) -> Vocabulary:
    return Vocabulary(codes, list(words))


class ChainPolicy(PreTrainedModel):
    """LR photos and token ids → logits of the next token."""

    config_class = PolicyConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: PolicyConfig):
        super().__init__(config)
        hidden = config.hidden_size
        self.vocabulary = config.vocabulary
        self.model = Qwen3Model(config.body)
        self.eye = Eye(hidden, config.eye_width, config.eye_blocks)
        self.patch_position = nn.Embedding(PATCH_TOKENS, hidden)
        self.cell_position = nn.Embedding(CELLS, hidden)
        self.from_eye = nn.Linear(hidden, hidden)
        self.from_previous = nn.Linear(hidden, hidden)
        self.drop = nn.Dropout(config.dropout)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def head(self, hidden: Tensor, first: int = 0) -> Tensor:
        """Hidden states (…, hidden) → logits (…, vocabulary), from its token `first` on."""
        return F.linear(hidden, self.get_input_embeddings().weight[first:].to(hidden.dtype))

    def grammar(
        self, tags: tuple[str, ...] = TAGS, texts: dict[str, str] | None = None
    ) -> LayoutGrammar:
        """The layout of this policy's completions, on its device."""
        return LayoutGrammar(self.vocabulary, tags, texts).to(self.device)

    @torch.no_grad()
    def start_from(self, tokenizer: VQModel, seed: int = 0) -> None:
        """Start the codes' embeddings from the codebook, randomly projected: codes that look alike
        start alike."""
        g = torch.Generator().manual_seed(seed)
        vectors = F.normalize(tokenizer.codebook.weight, dim=1).cpu()
        project = torch.randn(vectors.shape[1], self.config.hidden_size, generator=g) * 0.02
        table = self.get_input_embeddings().weight
        table[self.vocabulary.first_code :] = (vectors @ project).to(table)

    def cells(self, ids: Tensor) -> Tensor:
        """Token ids (b, n) → for each position the cell that its *next* token writes, or -1."""
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        tags = torch.tensor([self.vocabulary.ids[f"<{t}>"] for t in IMAGE_TAGS], device=ids.device)
        start = torch.where(ids == self.vocabulary.ids[START], place, -1).cummax(1).values
        opened = (ids[..., None] == tags).any(-1)
        tag = torch.where(opened, place, -1).cummax(1).values
        level = (ids.gather(1, tag.clamp(min=0))[..., None] == tags).int().argmax(-1)
        first = torch.tensor(FIRST_CELL, device=ids.device)[level]
        count = torch.tensor(GRIDS, device=ids.device)[level] ** 2
        inside = (start > tag) & (tag >= 0) & (place - start < count)
        return torch.where(inside, first + place - start, -1)

    def look(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """LR photos (b, 3, 32, 32) in [0, 1], or the eye's maps (b, hidden, 16, 16) cut from a
        larger photo's, → the prompt's patches (b, 64, hidden) and what the eye and the positions
        give each cell (b, cells, hidden). ValueError for photos of another size."""
        features = pixel_values.to(self.dtype)
        if features.shape[1] == 3:
            if tuple(features.shape[2:]) != (2 * GRIDS[-1], 2 * GRIDS[-1]):
                raise ValueError(f"the policy reads 32x32 pixels, got {tuple(features.shape)}")
            features = self.eye(features)
        patches = self.eye.patches(features) + self.patch_position.weight
        pooled = [F.adaptive_avg_pool2d(features, n).flatten(2) for n in GRIDS]
        seen = self.from_eye(torch.cat(pooled, 2).transpose(1, 2))
        return patches, seen + self.cell_position.weight

    def previous(self, codes: Tensor, cells: Tensor) -> Tensor:
        """What the image before gives to cells (b, n): `codes` (b, cells) holds token ids by cell,
        -1 where there is none → (b, n, hidden)."""
        parent = PARENTS.to(cells.device)[cells.clamp(min=0)]
        token = codes.gather(1, parent.clamp(min=0))
        known = (cells >= 0) & (parent >= 0) & (token >= 0)
        vector = self.from_previous(self.get_input_embeddings()(token.clamp(min=0)))
        return torch.where(known[..., None], vector, 0.0)

    def embed(self, ids: Tensor, pixel_values: Tensor) -> Tensor:
        """Input embeddings (b, n, hidden) of whole sequences (b, n), prompt first."""
        patches, seen = self.look(pixel_values)
        x = self.get_input_embeddings()(ids)
        here = ids == self.vocabulary.ids[LR]
        rank = (here.cumsum(1) - 1).clamp(0, PATCH_TOKENS - 1)
        patches = patches.take_along_dim(rank[..., None], 1).to(x.dtype)
        x = torch.where(here[..., None], patches, x)
        if not self.config.aligned:
            return x
        cells = self.cells(ids)
        written = torch.full((len(ids), CELLS + 1), -1, device=ids.device)
        index = torch.where(cells[:, :-1] >= 0, cells[:, :-1], CELLS)
        written.scatter_(1, index, ids[:, 1:])  # the token after a position fills its cell
        seen = seen.take_along_dim(cells.clamp(min=0)[..., None], 1)
        extra = seen + self.previous(written[:, :CELLS], cells)
        return x + torch.where((cells >= 0)[..., None], extra, 0.0).to(x.dtype)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **_,
    ) -> CausalLMOutput:
        """Logits (b, n, vocabulary), of the last `logits_to_keep` positions if above 0. `labels`
        (b, n), as transformers' Trainer gives them: -100 is left out of the loss."""
        x = self.drop(self.embed(input_ids, pixel_values))
        h = self.model(inputs_embeds=x, attention_mask=attention_mask, use_cache=False)
        logits = self.head(h.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            target = labels[:, -logits.shape[1] :][:, 1:]
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target.flatten())
        return CausalLMOutput(loss=loss, logits=logits)

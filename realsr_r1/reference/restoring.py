"""The chain at the paper's size: rendered and parsed in PURE's layout, generated under its grammar,
and a photo restored with it.

A Chameleon-class model (`chameleon`) reads the LR photo, enlarged to 512 pixels, as LlamaGen codes
and answers with text and images in one stream. Here a chain becomes token ids and back; `generate`
of transformers does the sampling, with one batched logits processor that knows where each row
stands. Sampling defaults are PURE's (its inference_solver.py and README).
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from realsr_r1 import images, vlcot
from realsr_r1.common import generator as seeded
from realsr_r1.pipeline import MAX_PIXELS, Restoration, Tile, in_batches, opened, origins
from realsr_r1.reference import chameleon, jacobi
from realsr_r1.reference.chameleon import BOS, END, PAD, ROW, START, TURN, Layout
from realsr_r1.reference.llamagen import LlamaGen, load_llamagen
from realsr_r1.sampling import Sampling, choose

# The instruction of the prompt, in our words (the paper's asks for the same three things).
PROMPT = (
    "Perceive how this photo was degraded, understand what it shows, and restore it step by "
    "step from coarse to fine."
)
PURE = Sampling(temperature=0.9, image_temperature=0.9, guidance=0.8)  # text greedy
CHAIN_SIZES = (128, 256, 512)  # pixels of the chain's images (paper); PURE itself draws one, (512,)
TILE, STRIDE, SCALE = 128, 96, 4  # LR pixels, LR pixels, factor: a tile's result has 512 pixels
MAX_NEW = 8192  # PURE's README
# What may come next: rows of the grammar's masks.
TEXT, LAST_TEXT, SIZE, CODE, ROW_END, IMAGE_END, FORCED = range(7)


def image_tokens(pixels: int, factor: int = 8) -> int:
    """Tokens of a square image: n·(n + 1) + 4 for n codes a side, i.e. 276, 1,060 and 4,164 for
    128, 256 and 512 pixels."""
    return (n := pixels // factor) * (n + 1) + 4


def check_sizes(sizes: tuple[int, ...] | None) -> None:
    """ValueError unless a chain of images of these sizes ends in a whole tile."""
    side, unit = TILE * SCALE, chameleon.SIZE_UNIT
    wrong = any(n % unit or n > unit * chameleon.LARGEST_SIZE for n in sizes or ())
    if sizes and (sizes[-1] != side or wrong):
        given, such = (" ".join(map(str, x)) for x in (sizes, CHAIN_SIZES))
        raise ValueError(
            f"sizes {given} do not fit: multiples of {unit} pixels, up to "
            f"{unit * chameleon.LARGEST_SIZE}, the last of them {side}, such as {such}"
        )


def prompt_ids(model: PreTrainedModel, codes: Tensor, prompt: str = PROMPT) -> Tensor:
    """The enlarged LR photo's codes (b, h, w) → prompts (b, p): sentence, image, end of turn. A
    model knows the sentence it was tuned with: for PURE's own weights give the one in its README,
    without the image mark."""
    head = [model.layout.names[BOS], *model.words.encode(prompt + " ", add_special_tokens=False)]
    return torch.tensor(
        [[*head, *model.layout.image_ids(c), model.layout.names[TURN]] for c in codes.cpu()]
    )


def render(chain: vlcot.Chain, model: PreTrainedModel) -> Tensor:
    """A complete chain → token ids (n,), ending the turn. Text between two images is tokenized in
    one piece."""
    ids, text = [], ""
    for tag in vlcot.TAGS:
        value, text = getattr(chain, tag), f"{text}<{tag}>"
        if tag in vlcot.IMAGE_TAGS:
            ids += [
                *model.words.encode(text, add_special_tokens=False),
                *model.layout.image_ids(value),
            ]
            text = f"</{tag}>"
        else:
            text += f"{value}</{tag}>"
    return torch.tensor(
        [*ids, *model.words.encode(text, add_special_tokens=False), model.layout.names[TURN]]
    )


def image_text(ids: list[int], layout: Layout) -> str:
    """An image's ids, from start to end, in the core's text form; "<image>" alone, which parsing
    refuses, unless they are a square laid out exactly as `Layout.image_ids` does."""
    codes = layout.code_of[torch.tensor(ids, dtype=torch.long)]
    codes = codes[codes >= 0]
    side = math.isqrt(len(codes))
    fits = side * side == len(codes) and side in layout.sizes.values()
    if not fits or layout.image_ids(codes.view(side, side)) != ids:
        return vlcot.START
    return vlcot.image_tokens(codes)


def text_of(ids: Tensor | list[int], model: PreTrainedModel) -> str:
    """Token ids → the text that `vlcot` and `rewards` read; padding and end of turn are left out.
    An image begins at its start token and lasts to its end, or to the first token of a text."""
    layout, parts, run, image = model.layout, [], [], []
    names = layout.names
    silent = {names[TURN], names[PAD], names[BOS]}
    inside = {names[ROW], names[END], *layout.sizes}
    for i in ids.tolist() if isinstance(ids, Tensor) else ids:
        laid_out = i in inside or int(layout.code_of[i]) >= 0
        if image and laid_out:
            image.append(i)
            if i != names[END]:
                continue
        if image:
            parts, image = [*parts, image_text(image, layout)], []
            if i == names[END]:
                continue
        if i == names[START]:
            parts, run = [*parts, model.words.decode(run)] if run else parts, []
            image = [i]
        elif laid_out:  # layout outside an image: parsing refuses what it stands in
            parts, run = [*parts, model.words.decode(run), "<row>"], []
        elif i not in silent:
            run.append(i)
    parts += [image_text(image, layout)] if image else []
    return " ".join([*parts, model.words.decode(run)] if run else parts)


def parse(ids: Tensor | list[int], model: PreTrainedModel) -> vlcot.Chain:
    """Token ids of a completion → Chain; what is missing or malformed is None, as
    in `vlcot.parse`."""
    return vlcot.parse(text_of(ids, model))


class Grammar:
    """What may come next, for a batch: text is free (layout tokens and codes are barred), an image
    has two sizes, rows, an end.

    A row's state is five integers and moves in O(1), without a loop over the batch. `sizes`
    (pixels) fixes the size of each image in turn, and no further image may begin; None leaves both
    to the model.
    """

    def __init__(
        self,
        layout: Layout,
        sizes: tuple[int, ...] | None = None,
        device: str | torch.device = "cpu",
    ):
        n, self.sizes, self.start_id = layout.names, sizes, layout.names[START]
        self.side = torch.zeros(layout.vocab_size, dtype=torch.long)
        self.side[list(layout.sizes)] = torch.tensor(list(layout.sizes.values()))
        masks = torch.zeros(FORCED + len(sizes or ()), layout.vocab_size, dtype=torch.bool)
        masks[CODE, layout.code_ids] = True
        masks[SIZE, list(layout.sizes)] = True
        masks[ROW_END, n[ROW]] = masks[IMAGE_END, n[END]] = True
        masks[TEXT] = ~masks[[SIZE, CODE, ROW_END, IMAGE_END]].any(0)
        masks[TEXT, [n[PAD], n[BOS]]] = False
        masks[LAST_TEXT] = masks[TEXT]
        masks[LAST_TEXT, self.start_id] = False
        for k, pixels in enumerate(sizes or ()):
            if (
                pixels % chameleon.SIZE_UNIT
                or not 0 < pixels <= chameleon.SIZE_UNIT * chameleon.LARGEST_SIZE
            ):
                raise ValueError(
                    f"an image of {pixels} pixels has no size token: take a multiple of "
                    f"{chameleon.SIZE_UNIT} up to 1024"
                )
            masks[FORCED + k, n[chameleon.size_name(pixels // chameleon.SIZE_UNIT)]] = True
        self.masks, self.side = masks.to(device), self.side.to(device)
        # All that can stand in an image's rows.
        self.columns = self.masks[[CODE, ROW_END, IMAGE_END]].any(0).nonzero()[:, 0]

    def start(self, batch: int, images: int = 0) -> None:
        """Every row stands in text, with `images` images behind it. `at`: −1 in text, 0 height, 1
        width, 2… in the rows."""
        new = lambda value: torch.full((batch,), value, device=self.masks.device)  # noqa: E731
        self.at, self.images = new(-1), new(images)
        self.h = self.w = self.column = new(0)

    @property
    def inside(self) -> Tensor:
        """(b,) boolean: the next word is part of an image's rows (or its end), where guidance and
        top-k hold."""
        return self.at >= 2

    def kind(self) -> Tensor:
        """(b,) the row of `masks` that holds the words allowed next."""
        free = self.sizes is None
        size = SIZE if free else FORCED + self.images - 1
        text = TEXT if free else torch.where(self.images >= len(self.sizes), LAST_TEXT, TEXT)
        end = self.at - 2 == self.h * (self.w + 1)
        body = torch.where(self.column == self.w, ROW_END, torch.where(end, IMAGE_END, CODE))
        return torch.where(self.at < 0, text, torch.where(self.inside, body, size))

    def step(self, word: Tensor) -> None:
        """Move on with the words (b,) just taken."""
        begins, height, width = (self.at < 0) & (word == self.start_id), self.at == 0, self.at == 1
        ends = self.inside & (self.at - 2 == self.h * (self.w + 1))
        side = self.side[word]
        self.column = torch.where(self.inside & (self.column < self.w), self.column + 1, 0)
        self.h, self.w = torch.where(height, side, self.h), torch.where(width, side, self.w)
        self.images = self.images + begins
        moved = torch.where(self.at >= 0, self.at + 1, torch.where(begins, 0, -1))
        self.at = torch.where(ends, -1, moved)


class ImageOnly:
    """Guidance's second reading: each row's context begins at its own latest image start, whatever
    came before is masked."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.cache = model, None

    @torch.no_grad()
    def logits(self, word: Tensor, begins: Tensor, inside: Tensor) -> Tensor | None:
        """The words (b,) just taken, which of them begin an image, which rows are in one → logits
        (b, v), or None if none is."""
        if not bool(inside.any()):
            self.cache = None
            return None
        if self.cache is None:
            self.cache, self.mask = DynamicCache(), word.new_zeros(len(word), 0)
        self.mask = torch.cat([self.mask * ~begins[:, None], torch.ones_like(word)[:, None]], 1)
        out = self.model.model(
            word[:, None],
            attention_mask=self.mask,
            position_ids=self.mask.sum(1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        )
        return self.model.lm_head(out.last_hidden_state[:, -1]).float().to(word.device)


class Interleaved(LogitsProcessor):
    """Chooses the next word of every row under the grammar and leaves it alone above minus
    infinity, so that greedy `generate` takes it: the draw has a generator of its own, which
    `generate` does not offer."""

    def __init__(
        self,
        model: PreTrainedModel,
        grammar: Grammar,
        how: Sampling,
        generator: torch.Generator | None,
        images: int = 0,
    ):
        self.grammar, self.how, self.generator, self.images = grammar, how, generator, images
        self.free, self.begun = ImageOnly(model), False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        grammar, how, other = self.grammar, self.how, None
        if not self.begun:
            grammar.start(len(input_ids), self.images)
            self.begun = True
        else:
            grammar.step(word := input_ids[:, -1])
            if how.guidance != 1.0:
                other = self.free.logits(word, grammar.at == 0, grammar.at >= 0)
        allowed, inside = grammar.masks[grammar.kind()], grammar.inside
        u = jacobi.uniform(self.generator, scores.device, len(scores))
        text = scores.float().masked_fill(~allowed, float("-inf"))
        chosen = text.argmax(-1) if how.greedy_text else choose(text / how.temperature, u)
        if bool(inside.any()):
            logits, free, mask = (
                None if x is None else x[inside][:, grammar.columns]
                for x in (scores, other, allowed)
            )
            some = jacobi.target(logits, mask, how, free, k_first=True)
            chosen[inside] = grammar.columns[choose(some, u[inside])]
        return torch.full_like(scores, float("-inf")).scatter(1, chosen[:, None], 0.0)


@dataclass
class _Turn:
    """One call of `generate`: the model, its grammar and settings, and the longest sequence."""

    model: PreTrainedModel
    grammar: Grammar
    how: Sampling
    generator: torch.Generator | None
    longest: int

    def go_on(self, ids: Tensor, stops: list[str], images: int) -> Tensor:
        """Sequences (b, n) continued up to one of the tokens `stops`; `images` are drawn."""
        names = self.model.layout.names
        config = GenerationConfig(
            max_new_tokens=self.longest - ids.shape[1],
            do_sample=False,
            pad_token_id=names[PAD],
            eos_token_id=[names[s] for s in stops],
        )
        chooser = Interleaved(self.model, self.grammar, self.how, self.generator, images)
        return self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=LogitsProcessorList([chooser]),
        )

    def image(self, ids: Tensor, pixels: int, window: int) -> Tensor | None:
        """A sequence (1, n) that has begun an image, with the whole image, drawn ahead by `window`
        guesses at a time; None where there is no room for it."""
        layout, n = self.model.layout, pixels // self.model.layout.factor
        if ids[0, -1] != self.grammar.start_id or ids.shape[1] + n * (n + 1) + 3 >= self.longest:
            return None
        unit = layout.names[chameleon.size_name(pixels // chameleon.SIZE_UNIT)]
        ids = torch.cat([ids, torch.tensor([[unit, unit]], device=ids.device)], 1)
        kinds = torch.tensor(([CODE] * n + [ROW_END]) * n + [IMAGE_END])
        readings = [jacobi.Reading(self.model, ids)]
        if self.how.guidance != 1.0:
            readings.append(jacobi.Reading(self.model, ids[:, -3:]))
        drawn = jacobi.speculative(
            readings, kinds, self.grammar.masks, self.how, window, self.generator, k_first=True
        )
        return torch.cat([ids, drawn.ids[None].to(ids.device)], 1)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Tensor,
    how: Sampling = PURE,
    generator: torch.Generator | None = None,
    sizes: tuple[int, ...] | None = None,
    max_new: int = MAX_NEW,
    window: int = 0,
) -> Tensor:
    """Prompts (b, p) of equal length → completions (b, n) on the CPU, ending the turn and padded
    with <pad>.

    `sizes` (pixels) as in `Grammar`. `window` > 0 draws images by speculative Jacobi decoding (one
    row, `sizes` given). Raises ValueError for settings that do not go together.
    """
    if window and (sizes is None or len(prompts) > 1):
        raise ValueError(
            "speculative decoding takes one prompt at a time and needs the images' sizes: give "
            "sizes, or window 0"
        )
    length, grammar = prompts.shape[1], Grammar(model.layout, sizes, model.device)
    turn = _Turn(model, grammar, how, generator, length + max_new)
    ids, drawn = prompts.to(model.device), sizes if window else ()
    for k, pixels in enumerate(drawn):
        ids = turn.go_on(ids, [TURN, START], k)
        longer = turn.image(ids, pixels, window)
        if longer is None:
            return ids[:, length:].cpu()
        ids = longer
    return turn.go_on(ids, [TURN], len(drawn))[:, length:].cpu()


@dataclass
class Reference:
    """A reference model and the LlamaGen tokenizer that its codes belong to."""

    model: PreTrainedModel
    tokenizer: LlamaGen


def load_reference(name: str | Path, tokenizer: str | Path | None = None, **options) -> Reference:
    """`chameleon.load(name, **options)` with LlamaGen's ds8 tokenizer: `tokenizer`, or
    vq_ds8_c2i.pt beside the model or from the hub."""
    beside = Path(name) / "vq_ds8_c2i.pt"
    # First: if it is absent, no time is lost.
    vq = load_llamagen(tokenizer or (beside if beside.exists() else beside.name))
    model = chameleon.load(name, **options)
    layout = model.layout
    if (vq.config.codes, vq.factor) != (layout.codes, layout.factor):
        raise ValueError(
            f"the tokenizer has {vq.config.codes} codes of {vq.factor} pixels "
            f"and the model {layout.codes} of {layout.factor}: "
            "take vq_ds8_c2i.pt with PURE's vocabulary (Lumina-mGPT's own image decoder is not "
            "part of transformers)"
        )
    return Reference(model, vq.to(model.device))


def final_codes(text: str) -> Tensor | None:
    """The answer (h, w) in a completion's text: the final image, or, from a model without the
    chain's tags such as PURE itself, the last image. None if it was cut short: an earlier image
    never stands in for the final one."""
    if any(f"<{t}>" in text for t in vlcot.TAGS):
        return vlcot.parse(text).final_image
    _, mark, last = text.rpartition(vlcot.START)
    image, end, _ = last.partition(vlcot.END)
    return vlcot.parse_image(mark + image + end)


def wavelet_color_fix(restored: Tensor, reference: Tensor, levels: int = 5) -> Tensor:
    """Detail of `restored` on the low frequencies of `reference`, both (b, 3, h, w): the color fix
    of PURE (from StableSR), by à-trous smoothing with [1 2 1]/4 at dilations 1, 2, 4 …"""
    k = torch.tensor([1.0, 2.0, 1.0], device=restored.device)
    k = (k[:, None] * k[None] / 16).expand(3, 1, 3, 3)

    def low(x: Tensor) -> Tensor:
        for i in range(levels):
            d = 2**i
            mode = "reflect" if d < min(x.shape[-2:]) else "replicate"
            x = F.conv2d(F.pad(x, (d, d, d, d), mode=mode), k, dilation=d, groups=3)
        return x

    return (restored - low(restored) + low(reference)).clamp(0, 1)


@torch.no_grad()
def restore_tiles(
    reference: Reference,
    up: Tensor,
    how: Sampling = PURE,
    generator: torch.Generator | None = None,
    prompt: str = PROMPT,
    **options,
) -> list[tuple[Tensor, vlcot.Chain]]:
    """Enlarged LR tiles (b, 3, 512, 512) in [0, 1] → each tile restored, colors fixed, with its
    chain. A tile without a final image of its size stays as it is, and its chain has none.
    `options` go to `generate`."""
    vq, model = reference.tokenizer, reference.model
    device = next(vq.parameters()).device
    prompts, out = prompt_ids(model, vq.encode(up.to(device)), prompt), []
    for x, ids in zip(up, generate(model, prompts, how, generator, **options), strict=True):
        text = text_of(ids, model)
        codes, chain = final_codes(text), vlcot.parse(text)
        fits = codes is not None and codes.shape[0] * vq.factor == x.shape[-1]
        if fits:
            made = vq.decode(codes[None].to(device)).cpu().float()
            x = wavelet_color_fix(made, x[None])[0]
        chain.final_image = codes if fits else None
        out.append((x, chain))
    return out


def restore_reference(
    photo: images.Source,
    reference: Reference | str | Path,
    how: Sampling = PURE,
    seed: int = 0,
    batch: int = 1,
    max_pixels: int = MAX_PIXELS,
    **options,
) -> Restoration:
    """Restore a photo ×4 with a reference model (or its folder or hub name): tiles of 128 LR
    pixels, overlapping by 32, blended. `options`: `prompt`, `sizes`, `window`, `max_new`.

    If memory runs out the batch is halved; on Ctrl-C what is done is kept and the rest is
    bicubic."""
    photo = opened(photo, max_pixels)
    w, h = photo.image.size
    reference = reference if isinstance(reference, Reference) else load_reference(reference)
    lr = images.to_tensor(photo.image)[None]
    lr = F.pad(lr, (0, max(0, TILE - w), 0, max(0, TILE - h)), mode="replicate")
    up = F.interpolate(lr, scale_factor=SCALE, mode="bicubic", align_corners=False).clamp(0, 1)[0]
    places, side = origins(lr.shape[-2:], TILE, STRIDE, 1), TILE * SCALE

    def draw(first: int, size: int) -> list[tuple[Tensor, vlcot.Chain]]:
        some = [(x * SCALE, y * SCALE) for x, y in places[first : first + size]]
        crops = torch.stack([up[:, y : y + side, x : x + side] for x, y in some])
        return restore_tiles(reference, crops, how, seeded(seed, first), **options)

    ramp = ((torch.arange(side) + 0.5) / ((TILE - STRIDE) * SCALE)).clamp(max=1)
    blend = torch.outer(ramp * ramp.flip(0), ramp * ramp.flip(0))
    total, weight, tiles = up * 1e-6, torch.full(up.shape[1:], 1e-6), []
    try:
        for (x, y), (made, chain) in in_batches(places, draw, batch, progress=True):
            here = slice(y * SCALE, y * SCALE + side), slice(x * SCALE, x * SCALE + side)
            total[:, here[0], here[1]] += made * blend
            weight[here] += blend
            tiles.append(Tile(x, y, chain))
    except KeyboardInterrupt:
        print(f"stopped after {len(tiles)} of {len(places)} tiles: the rest is bicubic")
    settings = {"seed": int(seed), "lr_size": [w, h], "tile": TILE, "stride": STRIDE}
    settings |= {"scale": SCALE, **asdict(how), **options}
    settings["bicubic_tiles"] = sum(t.chain.final_image is None for t in tiles)  # no valid answer
    image = images.to_image((total / weight)[:, : h * SCALE, : w * SCALE])
    complete = len(tiles) == len(places)
    alpha = photo.alpha and photo.alpha.resize(image.size, Image.Resampling.BICUBIC)
    return Restoration(image, vlcot.Chain(), tiles, settings, complete, alpha, photo.exif)

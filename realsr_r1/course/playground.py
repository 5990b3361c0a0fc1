"""A page of widgets to play with the model: choose a photo, damage it, watch the chain being
written, change its words, compare blind, save. Works in JupyterLab and in Colab."""

import base64
import html
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from realsr_r1 import degradation, images, perceptual, photographs
from realsr_r1.common import generator, write_text
from realsr_r1.grammar import LayoutGrammar
from realsr_r1.pipeline import RealSR
from realsr_r1.policy import FIRST_CELL
from realsr_r1.sampling import Samples, Sampling, sample
from realsr_r1.tokenizer import bicubic
from realsr_r1.vlcot import GRIDS, IMAGE_TAGS, TAGS, TEXT_TAGS

SHOWN = 224  # pixels of a picture on the page
HEADS = ("LR photo", "rough image", "middle image", "final image", "restored", "the truth")
QUALITY = 101  # the JPEG slider's end: no JPEG
WIDE = widgets.Layout(width="760px")


class Watched(LayoutGrammar):
    """A grammar that tells `seen` of every token (an id) and its state while a chain is written."""

    seen: Callable[[int, int], None]

    def step(self, state: Tensor, token: Tensor) -> Tensor:
        self.seen(int(state[0]), int(token[0]))
        return super().step(state, token)


def png(image: Image.Image, side: int = SHOWN) -> bytes:
    """A picture as PNG bytes, at `side` pixels, its pixels kept square."""
    file = io.BytesIO()
    image.resize((side, side), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def damaged(hr: Tensor, blur: float, noise: float, quality: int, seed: int = 0) -> Tensor:
    """An HR square (3, 128, 128) in [0, 1] → LR (3, 32, 32): blur (standard deviation in LR
    pixels), resize, noise (standard deviation of 255), JPEG (QUALITY: none)."""
    scale = degradation.PRESETS["nano"].scale
    kernel = {"kernel": "iso", "size": 33, "theta": 0.0, "beta": 1.0}
    size = [n // scale for n in hr.shape[-2:]]
    sigma = blur * scale
    draw = [
        {"op": "blur", "sigma_x": sigma, "sigma_y": sigma, **kernel} if blur else None,
        {"op": "resize", "size": size, "mode": "bicubic", "final": True, "antialias": True},
        {"op": "noise", "kind": "gaussian", "sigma": noise, "gray": False, "seed": seed},
        {"op": "jpeg", "quality": quality} if quality < QUALITY else None,
    ]
    return degradation.apply(hr[None], [[op for op in draw if op]])[0]


class Playground(widgets.VBox):
    """The page. `damage`, `write`, `redraw`, `compare` and `save` are what its buttons do."""

    def __init__(self, model: RealSR, folder: str | Path = "playground"):
        self.model, self.folder = model, Path(folder)
        self.photos = {Path(p.file).stem: p for p in photographs.load("test")}
        self.hr: Tensor | None = None  # (3, 128, 128)
        self.lr: Tensor | None = None  # (3, 32, 32)
        self.drawn: Samples | None = None
        self.wins, self.order = {"restored": 0, "bicubic": 0}, ["restored", "bicubic"]
        self._controls()
        self.pictures = [widgets.Image(width=150, format="png") for _ in HEADS]
        boxes = zip(HEADS, self.pictures, strict=True)
        strip = widgets.HBox([widgets.VBox([widgets.HTML(f"<b>{h}</b>"), p]) for h, p in boxes])
        self.said, self.sides = widgets.HTML(), [widgets.Image(width=SHOWN) for _ in "AB"]
        self.choice = widgets.HBox(
            [widgets.VBox(x) for x in zip(self.sides, self.pick, strict=True)]
        )
        self.choice.layout.display = "none"
        rows = [self.chooser, self.sliders, self.actions, strip, *self.texts.values()]
        super().__init__([*rows, self.again, self.said, self.blind, self.choice, self.download])
        self.damage()

    def _controls(self) -> None:
        def button(text: str, run: Callable[[], None]) -> widgets.Button:
            b = widgets.Button(
                description=text, layout=widgets.Layout(width="auto", align_self="flex-start")
            )
            b.on_click(lambda _: run())
            return b

        style = {"description_width": "initial"}
        first = next((n for n in self.photos if "periwinkle" in n), None)
        self.photo = widgets.Dropdown(options=list(self.photos), value=first, description="photo")
        self.upload = widgets.FileUpload(accept="image/*", description="or your own")
        self.as_is = widgets.Checkbox(description="mine is damaged already", indent=False)
        self.blur = widgets.FloatSlider(
            0.6, min=0, max=1.3, step=0.1, description="blur, LR px", style=style
        )
        self.noise = widgets.IntSlider(8, 0, 28, description="noise, of 255", style=style)
        self.jpeg = widgets.IntSlider(60, 18, QUALITY, description="JPEG quality", style=style)
        self.seed = widgets.IntText(0, description="seed")
        for w in (self.photo, self.upload, self.as_is, self.blur, self.noise, self.jpeg):
            w.observe(lambda _: self.damage(), names="value")
        self.chooser = widgets.HBox([self.photo, self.upload, self.as_is])
        self.sliders = widgets.HBox([self.blur, self.noise, self.jpeg, self.seed])
        self.texts = {t: widgets.Text(description=t.split("_")[0], layout=WIDE) for t in TEXT_TAGS}
        self.actions = widgets.HBox([button("write the chain", self.write)])
        self.again = button("draw again under these words", self.redraw)
        self.blind = widgets.HBox(
            [button("compare blind", self.compare), button("save", self.save)]
        )
        self.pick = [
            button(f"{x} is better", lambda i=i: self.picked(i)) for i, x in enumerate("AB")
        ]
        self.download = widgets.HTML()

    def damage(self) -> None:
        """Take the chosen photo and damage it as the sliders say; what was drawn is forgotten."""
        self.drawn = None
        try:
            chosen = self.photos[self.photo.value].image()
            if self.upload.value:  # a tuple of files; in ipywidgets 7, which Colab has, a dict
                files = self.upload.value
                files = list(files.values()) if isinstance(files, dict) else files
                chosen = images.open_photo(bytes(files[0]["content"]))
            self.hr = images.to_tensor(photographs.center(chosen, photographs.SIDE))
        except ValueError as e:
            self.tell(str(e))
            return
        self.name = "mine" if self.upload.value else self.photo.value  # of what is shown
        self.lr = damaged(self.hr, self.blur.value, self.noise.value, self.jpeg.value)
        if self.upload.value and self.as_is.value:
            self.lr = images.to_tensor(photographs.center(chosen, self.lr.shape[-1]))
            self.hr = None
        self.show([self.lr])
        for text in self.texts.values():
            text.value = ""
        self.tell("")

    def tell(self, text: str) -> None:
        self.said.value = html.escape(text)

    def show(self, pictures: list[Tensor]) -> None:
        """The first pictures (3, h, w) of HEADS; the others become white."""
        blank = torch.ones(3, 1, 1)
        for i, place in enumerate(self.pictures):
            place.value = png(images.to_image(pictures[i] if i < len(pictures) else blank))

    def write(self) -> None:
        """Write a chain, shown while it grows: words one by one, images row by row."""
        for text in self.texts.values():
            text.value = ""
        self._draw(None)

    def redraw(self) -> None:
        """Draw again under the words in the boxes, with the same noise."""
        before, words = self.drawn, {t: w.value.strip() for t, w in self.texts.items()}
        if before is None:
            self.tell("write a chain first: then change its words")
            return
        known = set(self.model.policy.vocabulary.text)
        for tag, text in words.items():
            unknown = [w for w in text.replace(",", " ,").split() if w not in known]
            if unknown or not text:
                what = (
                    f"the policy does not know {unknown[0]!r}" if text else "write a word or more"
                )
                self.tell(f"{tag.split('_')[0]}: {what}")
                return
        old = self.restored(before)
        self._draw(words)
        moved = perceptual.distance(old[None], self.restored(self.drawn)[None]).item()
        self.tell(f"{html.unescape(self.said.value)}; to the picture before: {moved:.3f}")

    def restored(self, drawn: Samples) -> Tensor:
        """(3, 128, 128): what the chain ends with."""
        return self.model.finish(drawn.chains, self.lr[None])[0]

    def _draw(self, texts: dict[str, str] | None) -> None:
        policy = self.model.policy
        grammar = Watched(policy.vocabulary, TAGS, texts)
        grammar.seen = self._watcher(grammar)
        grammar.run.zero_()  # forced tokens one by one, too: each is to be seen
        own, how = [generator(self.seed.value)], Sampling(lag=0)
        self.drawn = sample(policy, self.lr[None], how, own, grammar.to(policy.device))
        made, chain = self.restored(self.drawn), self.drawn.chains[0]
        steps = [self.model.decode(getattr(chain, t)[None])[0].cpu() for t in IMAGE_TAGS]
        self.show([self.lr, *steps, made, *([] if self.hr is None else [self.hr])])
        for tag, box in self.texts.items():
            box.value = getattr(chain, tag)
        said = "drawn"
        if self.hr is not None:
            away = [
                perceptual.distance(x[None], self.hr[None]).item() for x in (made, self.bicubic())
            ]
            said = "LPIPS to the truth: restored {:.3f}, bicubic {:.3f}".format(*away)
        self.tell(said)

    def _watcher(self, grammar: LayoutGrammar) -> Callable[[int, int], None]:
        """Shows tokens as they come: a word in its box, an image after each row of codes, what is
        missing taken from the image before."""
        vocabulary, grids, tag = self.model.policy.vocabulary, [], [TAGS[0]]
        cells, texts = grammar.cell.tolist(), set(vocabulary.text)

        def seen(state: int, token: int) -> None:
            word, cell = vocabulary.tokens[token], cells[state]
            if word in {f"<{t}>" for t in TAGS}:
                tag[0] = word[1:-1]
            elif word in texts and tag[0] in self.texts:
                box = self.texts[tag[0]]
                box.value = f"{box.value} {word}".strip().replace(" ,", ",")
            if cell < 0:
                return
            level = max(i for i, first in enumerate(FIRST_CELL) if first <= cell)
            n, at = GRIDS[level], cell - FIRST_CELL[level]
            if at == 0:
                coarse = grids[-1] if grids else torch.zeros(1, 1, dtype=torch.long)
                grown = F.interpolate(coarse[None, None].float(), size=(n, n), mode="nearest")
                grids.append(grown[0, 0].long())
            grids[-1].view(-1)[at] = token - vocabulary.first_code
            if (at + 1) % n == 0:
                now = self.model.decode(grids[-1][None])[0]
                self.pictures[level + 1].value = png(images.to_image(now))

        return seen

    def bicubic(self) -> Tensor:
        """The LR photo enlarged, (3, 128, 128)."""
        return bicubic(self.lr[None])[0].clamp(0, 1)

    def compare(self) -> None:
        """Restored and bicubic, in secret order: choose one."""
        if self.drawn is None:
            self.tell("write a chain first")
            return
        random.shuffle(self.order)
        made = {"restored": self.restored(self.drawn), "bicubic": self.bicubic()}
        self.choice.layout.display = "flex"
        for side, name in zip(self.sides, self.order, strict=True):
            side.value = png(images.to_image(made[name]))
        self.tell("which is better?")

    def picked(self, i: int) -> None:
        if self.choice.layout.display == "flex":
            self.wins[self.order[i]] += 1
            count = ", ".join(f"{name} {n}" for name, n in self.wins.items())
            self.tell(f"{'AB'[i]} was {self.order[i]}; so far: {count}")
            self.choice.layout.display = "none"

    def save(self) -> None:
        """Picture and chain go to the folder; the picture also becomes a link to download."""
        if self.drawn is None:
            self.tell("write a chain first")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = self.folder / f"{self.name}-{self.seed.value}"
        image = images.to_image(self.restored(self.drawn))
        images.write(images.Photo(image), stem.with_suffix(".png"))
        chain = self.drawn.chains[0]  # what it was drawn under, not what the boxes say now
        texts = {t: getattr(chain, t) for t in self.texts}
        write_text(stem.with_suffix(".json"), json.dumps(texts, indent=1))
        data = base64.b64encode(stem.with_suffix(".png").read_bytes()).decode()
        link = f'<a download="{stem.name}.png" href="data:image/png;base64,{data}">download</a>'
        self.download.value = f"saved as {html.escape(str(stem))}.png, {link}"

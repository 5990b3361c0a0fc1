"""A blind comparison: pairs in random order, a person chooses, a share with an interval.

`prepare` writes the pairs and a sealed key; `page` shows them in a notebook and keeps the answers;
`report` opens the key. No metric says whether people like a picture; a class can find out."""

import base64
import copy
import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from realsr_r1 import images
from realsr_r1.common import atomic
from realsr_r1.evaluation import peers
from realsr_r1.evaluation.benchmark import chain_method
from realsr_r1.evaluation.nano import SEVERITIES, cluster_of
from realsr_r1.photographs import ASSETS, Pairs, Photograph
from realsr_r1.pipeline import RealSR
from realsr_r1.sampling import Sampling
from realsr_r1.stats import Interval, clustered

Method = Callable[[Tensor], Tensor]  # LR (b, 3, h, w) in [0, 1] → (b, 3, 4h, 4w)
GAP = 12  # pixels between the two
CROP = 64  # LR pixels a side, of real photos
CHOICES = ("left", "same", "right")


def method(name: str, model: RealSR, seed: int = 0, sampling: Sampling = Sampling()) -> Method:
    """A method by name: chain, cold start (the chain before GRPO), first ending (the chain by that
    ending of the decoder), LR alone, bicubic, or one of `peers.METHODS`. Each picture has noise of
    its own, the same for two methods of one seed."""
    if name == "cold start":
        model = RealSR.from_pretrained(model.name, str(model.device), "policy-sft")
    if name == "first ending":
        model = RealSR(copy.deepcopy(model.tokenizer), model.policy, model.name)
        model.tokenizer.decoder.clean = None
    if name in ("chain", "cold start", "first ending"):
        call, seeds = chain_method(model, sampling), itertools.count(seed)
        return lambda lr: call(lr, next(seeds))[0]
    if name == "LR alone":
        return lambda lr: model.decode(lr=lr).cpu()
    if name not in peers.METHODS and not name.startswith(peers.ANY):
        known = ", ".join(("chain", "cold start", "first ending", "LR alone", *peers.METHODS))
        raise ValueError(f"no method {name!r}; choose from {known}")
    return peers.load(name)


@dataclass(frozen=True)
class Asked:
    """One question: an LR photo (3, h, w) in [0, 1], whose picture it is, what happened to it."""

    lr: Tensor
    cluster: str
    severity: str = "real"


def damaged(photos: list[Photograph], seed: int = 0) -> Iterator[Asked]:
    """One question per photograph; the severities take turns."""
    sets = [Pairs(photos, f"nano-{s}", seed=seed, training=False) for s in SEVERITIES]
    for i, photo in enumerate(photos):
        k = i % len(SEVERITIES)
        lr = sets[k][i]["lr"].float() / 255
        yield Asked(lr, cluster_of(vars(photo)), SEVERITIES[k])


def real(n: int, seed: int = 0, side: int = CROP) -> Iterator[Asked]:
    """`n` random squares of `side` pixels of the real photos that ship, which take turns."""
    rng, paths = np.random.default_rng(seed), sorted((ASSETS / "real_lr").glob("*.webp"))
    for i in range(n):
        path = paths[i % len(paths)]
        photo = images.to_tensor(images.open_photo(path))
        y, x = (int(rng.integers(0, size - side + 1)) for size in photo.shape[-2:])
        yield Asked(photo[:, y : y + side, x : x + side], path.stem)


def prepare(
    asked: list[Photograph] | Iterable[Asked], methods: dict[str, Method], out: Path, seed: int = 0
) -> int:
    """Write one picture per question to `out`, two methods side by side in an order that only
    `out`/key.sealed knows; returns how many. Photographs are `damaged` first. Raises ValueError
    unless there are two methods, or where `out` already holds files."""
    if len(methods) != 2:
        raise ValueError(f"a blind comparison has two methods, got {len(methods)}")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} already holds a comparison, or part of one: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    rng, key = np.random.default_rng(seed), []
    if isinstance(asked, list) and isinstance(asked[0], Photograph):
        asked = damaged(asked, seed)
    for i, question in enumerate(asked):
        names = [str(n) for n in rng.permutation(list(methods))]
        pair = [methods[n](question.lr[None])[0].clamp(0, 1) for n in names]
        gap = torch.ones(3, pair[0].shape[1], GAP)
        images.to_image(torch.cat([pair[0], gap, pair[1]], 2)).save(out / f"{i:03d}.png")
        about = {"cluster": question.cluster, "severity": question.severity}
        key.append({"left": names[0], "right": names[1]} | about)
        sealed = base64.b64encode(json.dumps({"methods": list(methods), "pairs": key}).encode())
        with atomic(out / "key.sealed") as part:  # so that nobody reads it by accident
            part.write_bytes(sealed)
    (out / "answers.csv").write_text("pair,choice\n", encoding="utf-8")
    return len(key)


def _key(out: Path) -> dict:
    """The open key: the methods' names and, of each pair, what lies where and whose it is."""
    if not (out / "key.sealed").exists():
        raise ValueError(f"{out} holds no comparison: prepare one first (realsr eval blind)")
    return json.loads(base64.b64decode((out / "key.sealed").read_bytes()))


def read_answers(out: Path) -> dict[int, str]:
    """Pair number → one of CHOICES, from `out`/answers.csv; the last answer counts. ValueError for
    a row that is none."""
    path = out / "answers.csv"
    if not path.exists():
        return {}
    numbers = [str(i) for i in range(len(_key(out)["pairs"]))]
    with path.open(newline="", encoding="utf-8-sig") as f:
        rows = [(r.get("pair"), r.get("choice")) for r in csv.DictReader(f)]
    if wrong := [r for r in rows if r[0] not in numbers or r[1] not in CHOICES]:
        raise ValueError(f"{path} has a row {wrong[0]} that is no answer: remove it")
    return {int(pair): choice for pair, choice in rows}


def answer(out: Path, pair: int, choice: str) -> None:
    """Keep one answer; ValueError for anything but CHOICES."""
    if choice not in CHOICES:
        raise ValueError(f"an answer is left, right or same, not {choice!r}")
    with (out / "answers.csv").open("a", encoding="utf-8") as f:  # others may be at work, too
        f.write(f"{pair},{choice}\n" if f.tell() else f"pair,choice\n{pair},{choice}\n")


@dataclass(frozen=True)
class Report:
    """How often the first method was preferred; "same" counts one half."""

    methods: tuple[str, str]
    share: Interval
    answers: int
    pairs: int

    def __str__(self) -> str:
        a, b = self.methods
        return f"{a} preferred to {b}: {self.share}, {self.answers} of {self.pairs} pairs answered"


def report(out: Path) -> Report:
    """Open the key. Raises ValueError where nothing has been answered yet."""
    key, answers = _key(out), read_answers(out)
    if not answers:
        raise ValueError(f"{out} holds no answers yet: open the page first (evaluation.blind.page)")
    first = key["methods"][0]
    values = [
        0.5 if c == "same" else float(key["pairs"][i][c] == first) for i, c in answers.items()
    ]
    share = clustered(values, [key["pairs"][i]["cluster"] for i in answers])
    return Report(tuple(key["methods"]), share, len(answers), len(key["pairs"]))


def page(out: str | Path):
    """The pairs that are still open, one after another, with three buttons: an ipywidgets page."""
    import ipywidgets as w

    out = Path(out)
    pairs = range(len(_key(out)["pairs"]))
    picture, text = w.Image(format="png", layout={"max_width": "min(100%, 700px)"}), w.Label()
    buttons = {c: w.Button(description=c) for c in CHOICES}
    shown: list[int] = []  # the last one is what the buttons answer: others may be at work, too

    def show() -> None:
        done = read_answers(out)
        left = [i for i in pairs if i not in done]
        text.value = f"Which one looks better? {len(left)} of {len(pairs)} are open."
        if left:
            shown.append(left[0])
            picture.value = (out / f"{left[0]:03d}.png").read_bytes()
            return
        picture.layout.display = "none"
        text.value = str(report(out))
        for b in buttons.values():
            b.disabled = True

    def choose(button) -> None:
        answer(out, shown[-1], button.description)
        show()

    for b in buttons.values():
        b.on_click(choose)
    show()
    return w.VBox([text, picture, w.HBox(list(buttons.values()))])

"""Methods side by side on one set: the same inputs, the same metrics, time and memory each, paired
intervals to a baseline.

    realsr eval benchmark --data eval --methods bicubic chain-sft --metrics psnr_y lpips niqe

Methods are those of `peers.METHODS`, "ncnn:FOLDER/NAME", and our own (OWN): chain-sft and
chain-grpo, and controls with the same decoder: a policy without a chain (direct), no codes
(lr-alone), no LR photo (plain). Every output is kept as an 8-bit PNG, and scores are computed from
that file, so a run that was interrupted and goes on gives what an undisturbed one gives. A method
or metric that cannot be had here is named in the table with the reason.

Time is that of restoring alone, the first call included, loading not. Kept outputs are used again
as long as the weights, the seed, the pictures and this package's version are the same; after a
change of the code itself, remove the cache folder.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import constants
from torch import Tensor
from tqdm.auto import tqdm

from realsr_r1 import degradation, pipeline, vlcot
from realsr_r1 import images as photos
from realsr_r1.common import atomic, device_of, out_of_memory, write_text
from realsr_r1.evaluation import metrics, nano, peers
from realsr_r1.evaluation import sets as benchsets
from realsr_r1.evaluation import tables as benchtable
from realsr_r1.evaluation.sets import BenchSet, Item
from realsr_r1.pipeline import TILE, RealSR, find_weights, pad
from realsr_r1.planning.budget import Meter
from realsr_r1.sampling import Sampling
from realsr_r1.version import __version__

OWN = ("chain-sft", "chain-grpo", "direct", "lr-alone", "plain")
BATCH, SMALL = 32, TILE * TILE  # so many photos together, of up to SMALL pixels; larger ones alone
Restorer = Callable[[Tensor], Tensor]  # (b, 3, h, w) → (b, 3, 4h, 4w), in [0, 1]


def plain(reason: object) -> str:
    """An error's sentence without this machine's folders and without its full stop, for a table
    that is shared."""
    places = {"HUB": torch.hub.get_dir(), "HF_HUB_CACHE": constants.HF_HUB_CACHE, "~": Path.home()}
    text = str(reason)
    for name, path in places.items():
        text = text.replace(str(path), name)
    return text.rstrip(".")


@dataclass
class Method:
    """`call(lr, seed)` gives the restored batch and, where the method has chains, those of each
    photo. `key` changes with whatever changes the result: kept outputs of another key are made
    again."""

    call: Callable[[Tensor, int], tuple[Tensor, list[list[vlcot.Chain]] | None]]
    key: str


# ---------------------------------------------------------------- methods


class Direct(RealSR):
    """A model whose policy draws the final image and nothing before it."""

    parts = vlcot.IMAGE_TAGS[-1:]


def chain_method(model: RealSR, sampling: Sampling = Sampling(), plain: bool = False) -> Callable:
    """`Method.call` of a policy: photos of one tile as a batch of chains, larger ones one by one.
    `plain`: without the LR photo at the decoder, photos of one tile only."""

    def call(lr: Tensor, seed: int) -> tuple[Tensor, list[list[vlcot.Chain]]]:
        if lr.shape[-2:] == (TILE, TILE):
            drawn = model.sample(lr, sampling, torch.Generator().manual_seed(seed))
            made = model.decode(drawn.codes).cpu() if plain else model.finish(drawn.chains, lr)
            return made, [[c] for c in drawn.chains]
        if plain:
            raise ValueError("plain is measured on photos of one tile: take another set")
        outputs, said = [], []
        for i, x in enumerate(lr):
            size = x.shape[-1] * x.shape[-2]
            result = model(photos.to_image(x), seed + i, sampling, progress=False, max_pixels=size)
            if not result.complete:  # on Ctrl-C half a photo is kept; a benchmark must not
                raise KeyboardInterrupt
            outputs.append(photos.to_tensor(result.image))
            said.append([t.chain for t in result.tiles])
        return torch.stack(outputs), said

    return call


def lr_alone(model: RealSR) -> Callable:
    """`Method.call` of the control without a chain."""

    def call(lr: Tensor, seed: int) -> tuple[Tensor, None]:
        h, w = (4 * n for n in lr.shape[-2:])
        made = [model.decode(lr=pad(x)[None])[0, :, :h, :w].cpu() for x in lr]
        return torch.stack(made), None

    return call


def fingerprint(*paths: Path) -> str:
    """Twelve digits that stand for the contents of files and folders of them."""
    digest = hashlib.sha256()
    for file in sorted(
        f for p in paths for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file()
    ):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def load_method(name: str, device: str | None = None, weights: str = "nano") -> Method:
    """A method by name. Raises ValueError for an unknown name, FileNotFoundError or RuntimeError in
    one sentence where its weights or its package are absent."""
    check_methods([name])
    if name not in OWN:
        peer = peers.load(name)
        key = f"{name} {fingerprint(*peers.files(name))}"
        return Method(lambda lr, seed: (peer(lr), None), key)
    named = {"chain-grpo": "policy-grpo", "direct": "policy-direct"}
    policy, sampling = named.get(name, "policy-sft"), Sampling()
    kind = Direct if name == "direct" else RealSR
    model, folder = kind.from_pretrained(weights, device, policy), find_weights(weights)
    parts = folder / policy, folder / "tokenizer", Path(pipeline.__file__)  # how photos are cut
    key = f"{fingerprint(*parts)} {sampling} {model.device}"
    if name == "lr-alone":
        return Method(lr_alone(model), f"{key} lr-alone")
    return Method(chain_method(model, sampling, name == "plain"), f"{key} {name}")


def check_methods(names: Sequence[str]) -> None:
    """ValueError, with the names there are, unless every name is a method's."""
    known = (*peers.METHODS, *OWN)
    if wrong := [n for n in names if n not in known and not n.startswith(peers.ANY)]:
        raise ValueError(
            f"no method {wrong[0]!r}; choose among {', '.join(known)}, {peers.ANY}FOLDER/NAME"
        )


# ---------------------------------------------------------------- restoring


class BadItem(ValueError):
    """A photo of the set cannot be read: no fault of the method that came upon it."""


def batches(
    items: list[Item],
) -> Iterator[tuple[int, list[Item], list[Tensor], list[Tensor | None]]]:
    """(number of the first, items, LR photos, originals): neighbors of one small size together.
    What belongs together does not depend on what is already done, for the noise of a batch is drawn
    for all of it."""
    group, first = [], 0
    for i, item in enumerate(items):
        try:
            lr, hr = item.read()
        except (ValueError, OSError) as e:
            raise BadItem(str(e)) from e
        small = lr.shape[-1] * lr.shape[-2] <= SMALL
        if group and not (small and lr.shape == group[0][1].shape and len(group) < BATCH):
            yield first, *map(list, zip(*group, strict=True))
            group, first = [], i
        group.append((item, lr, hr))
    if group:
        yield first, *map(list, zip(*group, strict=True))


def file_name(name: str) -> str:
    """A method's name as that of a folder; of two methods never the same."""
    safe = re.sub(r"[^A-Za-z0-9.-]+", "_", name)
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def place(folder: Path, number: int, item: Item) -> Path:
    """The PNG of an item; its notes lie beside it with the suffix .json."""
    return folder / f"{number:05d}_{re.sub(r'[^A-Za-z0-9.-]+', '_', item.id)[:80]}.png"


def read_notes(picture: Path) -> dict:
    """The notes kept beside a picture: key, cost, what the chain said, scores. Empty if either file
    is absent or cut short."""
    try:
        return (
            json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))
            if picture.exists()
            else {}
        )
    except (ValueError, OSError):
        return {}


def key_of(start: bytes, *pictures: Tensor | None) -> str:
    """Stands for what a result depends on: `start`, and the pictures as 8-bit values."""
    parts = [(x * 255).round().byte().numpy().tobytes() for x in pictures if x is not None]
    return hashlib.sha1(b"|".join([start, *parts])).hexdigest()


def said(chains: list[vlcot.Chain], item: Item) -> dict[str, float]:
    """Share of a photo's tiles whose chain names each label, and the annotation's words, rightly;
    nothing where they are not known."""
    labels = item.labels or {}
    if item.photo:
        words = degradation.to_words(labels)
        rows = [nano.words_right(c, item.photo, words) for c in chains]
    else:
        rows = [{k: float(c.labels.get(k) == v) for k, v in labels.items()} for c in chains]
    return {k: float(np.mean([r[k] for r in rows])) for k in rows[0]}


def restore_all(
    data: BenchSet, name: str, load: Callable[[], Method], folder: Path, seed: int = 0
) -> None:
    """Restore every item that is not yet in `folder` under the method's present key: PNG and notes,
    batch by batch."""
    folder.mkdir(parents=True, exist_ok=True)
    before = Meter.held()
    method = load()
    with tqdm(total=len(data), desc=name, mininterval=2) as bar, torch.no_grad():
        for first, items, lr, hr in batches(data.items):
            start = f"{__version__} {method.key} {seed} {first} {len(items)}".encode()
            keys = [key_of(start, *pair) for pair in zip(lr, hr, strict=True)]
            files = [place(folder, first + i, item) for i, item in enumerate(items)]
            if [read_notes(f).get("key") for f in files] != keys:
                with Meter(before) as memory:
                    started = time.perf_counter()
                    outputs, chains = method.call(torch.stack(lr), seed + first)
                    seconds = (time.perf_counter() - started) / len(items)
                for i, (file, item, x) in enumerate(zip(files, items, lr, strict=True)):
                    if outputs[i].shape != (3, 4 * x.shape[1], 4 * x.shape[2]):
                        raise ValueError(
                            f"{name} made {tuple(outputs[i].shape)} of {tuple(x.shape)}: a "
                            f"method must enlarge four times"
                        )
                    notes = {
                        "key": keys[i],
                        "seconds": seconds,
                        "megabytes": memory.megabytes,
                        "pixels": outputs[i][0].numel(),
                        "timed": f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads",
                        "said": said(chains[i], item) if chains else {},
                        "scores": {},
                    }
                    # Never old notes beside a new picture.
                    file.with_suffix(".json").unlink(missing_ok=True)
                    with atomic(file) as part:
                        photos.to_image(outputs[i]).save(part, "PNG", compress_level=1)
                    write_text(file.with_suffix(".json"), json.dumps(notes))
            bar.update(len(items))


# ---------------------------------------------------------------- scoring


def score_all(
    data: BenchSet, name: str, folders: dict[str, Path], device: str | torch.device = "cpu"
) -> str:
    """Score every output of every method by one metric, into the notes beside it. Returns how many
    pictures have no number and why, or nothing. Raises as `metrics.load` does, and ValueError where
    the set or no picture of it is fit for the metric."""
    metric, score = metrics.named(name), None
    few, odd = f"are smaller than {metric.smallest} px", "are flat or otherwise out of its range"
    without = {few: 0, odd: 0}
    if metric.reference and not data.paired:
        raise ValueError(f"it compares with originals and {data.name} has none")
    with tqdm(total=len(data) * len(folders), desc=name, mininterval=2) as bar:
        for folder in folders.values():
            for first, items, lr, hr in batches(data.items):
                files = [place(folder, first + i, item) for i, item in enumerate(items)]
                notes = [read_notes(f) for f in files]
                small = 4 * min(lr[0].shape[1:]) < metric.smallest
                if any(name not in n["scores"] for n in notes):
                    score = score or metrics.load(name, device)
                    outputs = torch.stack([photos.to_tensor(photos.open_photo(f)) for f in files])
                    originals = torch.stack(hr) if data.paired else None
                    values = [None] * len(items) if small else score(outputs, originals).tolist()
                    for file, n, v in zip(files, notes, values, strict=True):
                        n["scores"][name] = v if v is not None and np.isfinite(v) else None
                        write_text(file.with_suffix(".json"), json.dumps(n))
                missing = sum(n["scores"][name] is None for n in notes)
                without[few if small else odd] += missing
                bar.update(len(items))
    why = [f"{n} {what}" for what, n in without.items() if n]
    every = len(data) * len(folders)
    if sum(without.values()) == every:
        raise ValueError(f"of {every} pictures {' and '.join(why)}")
    return f"{name}: of {every} pictures {' and '.join(why)}, and are left out" if why else ""


def fid_all(
    data: BenchSet, folders: dict[str, Path], device: str | torch.device = "cpu"
) -> dict[str, float]:
    """FID of each method's outputs to the originals; raises as `metrics.check_fid` does, before
    anything is computed."""
    if not data.paired:
        raise ValueError(f"it compares with originals and {data.name} has none")
    metrics.check_fid(len(data))
    originals, found = next(iter(folders.values())).parent / "originals", {}
    originals.mkdir(exist_ok=True)
    for i, item in enumerate(data.items):
        photos.to_image(item.read()[1]).save(place(originals, i, item), compress_level=1)
    for method, folder in folders.items():
        files = [place(folder, i, item) for i, item in enumerate(data.items)]
        keys, kept = "".join(read_notes(f)["key"] for f in files), folder / "fid.txt"
        key = hashlib.sha1(keys.encode()).hexdigest()
        if not kept.exists() or kept.read_text(encoding="utf-8").split()[0] != key:
            sharp = [place(originals, i, item) for i, item in enumerate(data.items)]
            write_text(kept, f"{key} {metrics.fid(files, sharp, device)}")
        found[method] = float(kept.read_text(encoding="utf-8").split()[1])
    return found


# ---------------------------------------------------------------- the run


def smallest_side(folders: dict[str, Path], data: BenchSet) -> int:
    """The smallest side of the set's restored pictures, in pixels."""
    folder = next(iter(folders.values()))
    return min(
        min(photos.open_photo(place(folder, i, item)).size) for i, item in enumerate(data.items)
    )


def collect(data: BenchSet, folders: dict[str, Path], names: Sequence[str]) -> dict[str, dict]:
    """What the notes hold: per method the scores and said facts (lists in the items' order) and the
    cost."""
    out = {}
    for name, folder in folders.items():
        notes = [read_notes(place(folder, i, item)) for i, item in enumerate(data.items)]
        facts = {
            k: [n["said"][k] for n in notes]
            for k in notes[0]["said"]
            if all(k in n["said"] for n in notes)
        }
        # the paper's two rewards on text, as shares: five labels, and the tags (subject and
        # background) in the rough text
        if facts:
            two = {"degradation": degradation.LABELS, "understanding": ("subject", "background")}
            facts |= {
                k: np.mean([facts[p] for p in of], axis=0).tolist()
                for k, of in two.items()
                if all(p in facts for p in of)
            }
        out[name] = {
            "scores": {k: [n["scores"][k] for n in notes] for k in names},
            "said": facts,
            "seconds": sum(n["seconds"] for n in notes),
            "megapixels": sum(n["pixels"] for n in notes) / 1e6,
            "megabytes": max(n["megabytes"] for n in notes),
            "timed": sorted({n.get("timed", "not noted") for n in notes}),
        }
    return out


def restore_methods(
    data: BenchSet, loads: dict[str, Callable[[], Method]], root: Path, seed: int
) -> tuple[dict[str, Path], dict[str, str]]:
    """Restore the set by every method: the folder of each that could be had, and of the others why
    not. ValueError if none could."""
    folders, left_out = {}, {}
    for name, load in loads.items():
        try:
            folder = root / file_name(name)
            restore_all(data, name, load, folder, seed)
            folders[name] = folder
        except (ValueError, FileNotFoundError, RuntimeError) as e:
            if isinstance(e, BadItem) or out_of_memory(e):
                raise
            left_out[name] = f"left out, {plain(e)}"
    if not folders:
        raise ValueError(
            f"none of the methods can be had here: "
            f"{'; '.join(f'{k}, {v}' for k, v in left_out.items())}"
        )
    return folders, left_out


def score_measures(
    data: BenchSet, measures: Sequence[str], folders: dict[str, Path], device: torch.device
) -> tuple[list[str], dict[str, float], dict[str, str], list[str]]:
    """Score by every metric: those that gave numbers, each method's FID, why others were skipped,
    and remarks for the table."""
    scored, fids, skipped, remarks = [], {}, {}, []
    for name in measures:
        try:
            if metrics.named(name).whole_set:
                fids = fid_all(data, folders, device)
                if len(data) < metrics.FID_ENOUGH:
                    remarks.append(
                        f"fid: of {len(data)} pictures it is biased upwards, so compare it only "
                        f"between methods of this table."
                    )
                continue
            if remark := score_all(data, name, folders, device):
                remarks.append(f"{remark}.")
            scored.append(name)
            if name == "niqe" and (blocks := smallest_side(folders, data)) < 2 * 96:
                remarks.append(
                    f"niqe: in pictures of {blocks} px a side there is one row of blocks of 96 "
                    f"px, or one block, so it lacks the spread between many: compare it within "
                    f"this table only."
                )
        except (ValueError, FileNotFoundError, ModuleNotFoundError) as e:
            skipped[name] = f"skipped, {plain(e).removeprefix(f'{name}: ')}"
    return scored, fids, skipped, remarks


@dataclass(frozen=True)
class Settings:
    """How a benchmark runs. `cache`: pictures, notes and scores, from which the same call goes on;
    `weights`: of our methods; `n`: the first so many items of a set that is named."""

    out: str | Path = "results"
    baseline: str = "bicubic"
    n: int | None = None
    cache: str | Path = "runs/benchmark"
    seed: int = 0
    device: str | None = None
    weights: str = "nano"


def loaders(
    methods: Sequence[str] | dict[str, Restorer], settings: Settings
) -> dict[str, Callable[[], Method]]:
    """What loads each method; ValueError for an unknown one, or without the baseline."""
    if isinstance(methods, dict):
        of = {k: (lambda lr, seed, f=f: (f(lr), None)) for k, f in methods.items()}
        loads = {k: partial(Method, call, k) for k, call in of.items()}
    else:
        check_methods(methods)
        how = settings.device, settings.weights
        loads = {k: partial(load_method, k, *how) for k in methods}
    if settings.baseline not in loads:
        raise ValueError(
            f"the baseline {settings.baseline} is not among the methods {', '.join(loads)}: add "
            f"it, or choose another --baseline"
        )
    return loads


def told_apart(methods: dict[str, dict]) -> list[str]:
    """A remark where the methods' seconds were not measured alike."""
    if len({t for m in methods.values() for t in m["timed"]}) < 2:
        return []
    times = "; ".join(f"{name} {' and '.join(m['timed'])}" for name, m in methods.items())
    return [f"Seconds were not measured alike, so do not compare them: {times}."]


def run(
    data: BenchSet | str,
    methods: Sequence[str] | dict[str, Restorer],
    measures: Sequence[str] = tuple(metrics.METRICS),
    settings: Settings = Settings(),
) -> dict:
    """Measure `methods` on `data` by `measures` and write `out`/benchmark-SET.md, .csv and .json;
    returns what the last holds.

    data: a set, or a name that `benchsets.load` takes. methods: names, or callables
    (b, 3, h, w) → (b, 3, 4h, 4w) by name; a callable's outputs are kept under its name.
    Raises ValueError for unknown names or if no method can be had.
    """
    measures = list(dict.fromkeys(measures))
    for name in measures:
        metrics.named(name)
    loads, device = loaders(methods, settings), device_of(settings.device)
    data = benchsets.load(data, settings.n) if isinstance(data, str) else data
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    folders, left_out = restore_methods(
        data, loads, Path(settings.cache) / data.name, settings.seed
    )
    scored, fids, skipped, remarks = score_measures(data, measures, folders, device)
    found = collect(data, folders, scored)
    for name, value in fids.items():
        found[name]["fid"] = value
    groups = [i.group for i in data.items]
    minutes = sum(m["seconds"] for m in found.values()) / 60
    record = {
        "set": data.name,
        "baseline": settings.baseline,
        "groups": groups,
        "ids": [i.id for i in data.items],
        "methods": found,
        "skipped": left_out | skipped,
        "remarks": remarks + told_apart(found),
        "note": f"{data.name}: {data.note}; {len(data)} items in {len(set(groups))} groups (of one "
        f"photo or photographer), seed {settings.seed}, {device}, {time.strftime('%Y-%m-%d')}, "
        f"{minutes:.1f} min of restoring; 95% bootstrap intervals over groups.",
    }
    benchtable.save(record, out, f"benchmark-{data.name}")
    print("\n".join(benchtable.tables(record)))
    return record

"""Rows that SFT and GRPO read, from any source of photos: on the fly, or as parquet files for
millions of photos.

An encoder turns pairs into rows: `ChainRows` for SFT, `PromptRows` for GRPO, or any other callable
that gives rows and what it left out, with `features` and a `fingerprint`. `write_shards` does one
process's share and continues after a kill:

    encode = ChainRows(vq, reader, Vocabulary(vq.config.codes, reader.vocabulary), device="cuda")
    notes = folders.read_captions("LSDIR")
    write_shards("LSDIR", "rows", encode, Recipe(), notes, shard=(rank, world))  # one call a
      process, on any machine
    sft.train_sft(read_shards("rows"), None, ...)  # when all are done
"""

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Array3D, Dataset, Features, IterableDataset, List, Value, load_dataset

from realsr_r1.corpus.sources import ROW, Recipe, Sample, check_join, open_source, pairs
from realsr_r1.first import degradation, scenes, sft
from realsr_r1.first.reader import LRReader
from realsr_r1.first.tokenizer import VQModel
from realsr_r1.first.vlcot import PAD, Vocabulary

log = logging.getLogger(__name__)


def plain_words(text: str) -> list[str]:
    """A caption's words as the nano policy writes them: lower case, without punctuation."""
    return re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*", text.lower())


@dataclass
class ChainRows:
    """Pairs with captions → chains for SFT: `input_ids` and `labels`, -100 on the prompt, as
    `sft.chains` makes them.

    Words that the vocabulary lacks are dropped from the captions, and each is cut to `most_words`,
    as the grammar does.
    """

    tokenizer: VQModel
    reader: LRReader
    vocabulary: Vocabulary
    device: str | torch.device = "cpu"
    most_words: int = 24
    features = Features(
        {"file": Value("string"), "input_ids": List(Value("int32")), "labels": List(Value("int32"))}
    )

    def __call__(self, data: scenes.Pairs) -> tuple[list[dict], list[dict]]:
        known, kept, skipped = set(self.vocabulary.text), [], []
        for i, s in enumerate(data.scenes):
            captions = [
                " ".join([w for w in plain_words(c) if w in known][: self.most_words])
                for c in s.captions or ()
            ]
            if captions and all(captions):
                kept.append((i, Sample(s.file, tuple(captions), s.tags)))
            else:
                skipped.append(
                    {
                        "file": s.file,
                        "why": "a caption is missing, or has no word that the vocabulary knows",
                    }
                )
        if not kept:
            return [], skipped
        index = [i for i, _ in kept]
        some = scenes.Pairs(
            data.hr[index], data.lr[index], [data.labels[i] for i in index], [s for _, s in kept]
        )
        ids, prompt = sft.tokenise(
            some, self.tokenizer, self.reader, self.vocabulary, device=self.device
        )
        rows = []
        for sample, row, n in zip(some.scenes, ids.astype(np.int32), prompt, strict=True):
            row = row[
                row != self.vocabulary.ids[PAD]
            ]  # padding is for the batch that the trainer makes
            rows.append(
                {
                    "file": sample.file,
                    "input_ids": row.tolist(),
                    "labels": np.where(np.arange(len(row)) < n, -100, row).tolist(),
                }
            )
        return rows, skipped

    @property
    def fingerprint(self) -> str:
        return _digest(
            self.tokenizer.quantize.weight,
            self.reader.vectors,
            "\n".join(self.vocabulary.words),
            self.most_words,
        )


@dataclass
class PromptRows:
    """Pairs → prompts for GRPO, with the columns of `grpo.prompts`: `prompt`, `degradation`, `tags`
    and, where `keep_hr`, the pixels `hr` (3, s, s) uint8 that reference rewards need (large: 49 kB
    a row at 128 pixels)."""

    reader: LRReader
    vocabulary: Vocabulary
    keep_hr: int | None = None  # pixels a side of the recipe

    @property
    def features(self) -> Features:
        base = {
            "file": Value("string"),
            "prompt": Value("string"),
            "degradation": Value("string"),
            "tags": List(Value("string")),
        }
        return Features(
            base
            | ({"hr": Array3D((3, self.keep_hr, self.keep_hr), "uint8")} if self.keep_hr else {})
        )

    @torch.no_grad()
    def __call__(self, data: scenes.Pairs) -> tuple[list[dict], list[dict]]:
        device, rows = self.reader.vectors.device, []
        ids = self.vocabulary.prompts(self.reader.encode(data.lr.to(device).float() / 255).cpu())
        for i, (sample, words) in enumerate(zip(data.scenes, ids.tolist(), strict=True)):
            rows.append(
                {
                    "file": sample.file,
                    "prompt": self.vocabulary.decode(words),
                    "degradation": degradation.to_words(data.labels[i]),
                    "tags": list(sample.tags),
                }
                | ({"hr": data.hr[i].numpy()} if self.keep_hr else {})
            )
        return rows, []

    @property
    def fingerprint(self) -> str:
        return _digest(self.reader.vectors, "\n".join(self.vocabulary.words), self.keep_hr)


def _digest(*parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(
            part.detach().cpu().contiguous().numpy().tobytes()
            if isinstance(part, torch.Tensor)
            else str(part).encode()
        )
    return digest.hexdigest()[:16]


def on_the_fly(
    data: IterableDataset,
    encode: Callable,
    recipe: Recipe = Recipe(),
    notes: dict | None = None,
    batch: int = 32,
) -> IterableDataset:
    """Photos → rows of `encode` (ChainRows, PromptRows or alike), made as they are asked for,
    `batch` photos at a time.

    Photos that cannot be used are left out with a line in the log. For a trainer give `max_steps`;
    another epoch with other crops is another `recipe.seed`. Encoding in the training process is the
    slow way: see `write_shards`.
    """

    def rows(columns: dict[str, list]) -> dict[str, list]:
        made, skipped = _encode(
            [
                dict(zip(columns, values, strict=True))
                for values in zip(*columns.values(), strict=True)
            ],
            encode,
            recipe,
            notes,
        )
        for s in skipped:
            log.warning("left out %s: %s", s["file"], s["why"])
        return {k: [r[k] for r in made] for k in encode.features}

    return data.map(
        rows, batched=True, batch_size=batch, remove_columns=list(ROW), features=encode.features
    )


def _encode(
    rows: list[dict], encode: Callable, recipe: Recipe, notes: dict | None
) -> tuple[list[dict], list[dict]]:
    made, skipped = pairs(rows, recipe, notes)
    encoded, more = encode(made) if made else ([], [])
    return encoded, skipped + more


# ---------------------------------------------------------------- shards on disk


def _write(path: Path, value: dict) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def write_shards(
    where: str | Path,
    out: str | Path,
    encode: Callable,
    recipe: Recipe = Recipe(),
    notes: dict[str, dict] | None = None,
    shard: tuple[int, int] = (0, 1),
    photos_per_file: int = 1000,
    split: str = "train",
    batch: int = 32,
) -> dict[str, int]:
    """Encode a source's photos into parquet files in the folder `out`, one for each
    `photos_per_file` photos of this process.

    Beside each file lies its note (.json: how many photos and rows, what was left out and why); a
    file with a note is complete, and the same call after a kill goes on behind the last one. Run it
    once for each shard (index, number), on as many machines as there are. Returns the totals
    {"photos", "rows", "skipped"}. Raises ValueError if `out` holds files of other settings or
    photos, or if no photo has captions.
    """
    out, (index, number) = Path(out), shard
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "recipe": asdict(recipe),
        "encoder": encode.fingerprint,
        "processes": number,
        "photos_per_file": photos_per_file,
    }
    settings = json.loads(json.dumps(settings))
    if (out / "settings.json").exists() and json.loads(
        (out / "settings.json").read_text()
    ) != settings:
        raise ValueError(
            f"{out} holds rows of another recipe, encoder, number of processes or file size: "
            f"use a new folder"
        )
    _write(out / f"settings.{index}.json", settings)
    (out / f"settings.{index}.json").replace(out / "settings.json")  # processes write the same
    stem = f"rows-{index:05d}-of-{number:05d}"
    known = [json.loads(p.read_text()) for p in sorted(out.glob(f"{stem}-*.json"))]
    last = max(0, len(known) - 1)  # read again, undecoded, to see that the photos are the same
    stream = iter(open_source(where, split, shard).skip(last * photos_per_file))
    for at in itertools.count(last):
        part = itertools.islice(stream, photos_per_file)
        path = out / f"{stem}-{at:05d}.parquet"
        if at < len(known):
            if known[at]["names"] != _digest("\n".join(row["file"] for row in part)):
                raise ValueError(
                    f"the photos are no longer those that {path.name} was made from: use a new "
                    f"folder"
                )
        elif note := _write_one(path, part, encode, recipe, notes, batch):
            known.append(note)
        if at >= len(known) or known[at]["photos"] < photos_per_file:
            break
    total = {
        "photos": sum(k["photos"] for k in known),
        "rows": sum(k["rows"] for k in known),
        "skipped": sum(len(k["skipped"]) for k in known),
    }
    _write(out / f"done-{index:05d}-of-{number:05d}.json", total)
    return total


def _write_one(
    path: Path,
    rows: Iterator[dict],
    encode: Callable,
    recipe: Recipe,
    notes: dict | None,
    batch: int,
) -> dict | None:
    """Encode some photos, holding the bytes of one batch at a time; the parquet file, then its
    note. None if there are none."""
    files, made, skipped = [], [], []
    while some := list(itertools.islice(rows, batch)):
        files += [row["file"] for row in some]
        new, left_out = _encode(some, encode, recipe, notes)
        made += new
        skipped += left_out
    if not files:
        return None
    if notes is not None and path.stem.endswith("-00000"):
        check_join(files, notes)
    if made:
        part = path.with_suffix(".parquet.part")
        Dataset.from_list(made, features=encode.features).to_parquet(str(part))
        part.replace(path)
    note = {
        "photos": len(files),
        "rows": len(made),
        "names": _digest("\n".join(files)),
        "skipped": skipped,
    }
    _write(path.with_suffix(".json"), note)
    return note


def read_shards(folder: str | Path, streaming: bool = True) -> IterableDataset | Dataset:
    """What `write_shards` wrote, as one dataset; its files are its shards, for many processes and
    loaders.

    Streamed, SFT needs `max_steps`; GRPO draws its prompts by index and needs `streaming=False` (a
    copy in the cache of `datasets`). Raises ValueError if a process has not finished or there are
    no rows.
    """
    folder = Path(folder)
    settings = folder / "settings.json"
    if not settings.exists():
        raise ValueError(f"{folder} holds no rows: write them with shards.write_shards first")
    n = json.loads(settings.read_text())["processes"]
    open_ones = [i for i in range(n) if not (folder / f"done-{i:05d}-of-{n:05d}.json").exists()]
    if open_ones:
        raise ValueError(
            f"shards {open_ones} of {n} in {folder} are not finished: run them again, they go "
            f"on where they were"
        )
    files = [
        str(p.with_suffix(".parquet"))
        for p in sorted(folder.glob("rows-*.json"))
        if json.loads(p.read_text())["rows"]
    ]
    if not files:
        raise ValueError(
            f'{folder} has no rows, all photos were left out: see "why" in its rows-*.json'
        )
    return load_dataset("parquet", data_files=files, split="train", streaming=streaming)

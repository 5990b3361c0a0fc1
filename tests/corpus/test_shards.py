import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from realsr_r1.corpus import folders, shards, sources
from realsr_r1.first import policy, sft, vlcot

CAPTIONS = [
    "A bird on grass.",
    "a white seabird, on green grass",
    "a large white zebra at the lower left",
]


@pytest.fixture
def folder(tmp_path):
    """Seven photos, captions for all but the last."""
    where = tmp_path / "in"
    where.mkdir()
    for i in range(7):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (130, 140, 3), np.uint8)).save(
            where / f"{i}.png"
        )
    lines = [
        json.dumps({"file": f"{i}.png", "captions": CAPTIONS, "tags": ["bird", "grass"]})
        for i in range(6)
    ]
    (where / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return where


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def chains(tiny, words):
    return shards.ChainRows(*tiny[:2], words)


def test_a_chain_row_says_what_the_photo_shows(folder, chains, words):
    data, _ = sources.pairs(
        sources.open_source(folder).take(1), notes=folders.read_captions(folder)
    )
    (row,), skipped = chains(data)
    assert skipped == [] and row["file"] == "0.png"
    n = row["labels"].count(-100)
    assert row["input_ids"][n:] == row["labels"][n:] and set(row["labels"][:n]) == {-100}
    assert words.decode(row["input_ids"][:n]).endswith(vlcot.CHAIN)
    text = words.decode(row["labels"][n:])
    assert vlcot.well_formed(text)
    chain = vlcot.parse(text)
    assert (
        chain.rough_understand == "a bird on grass"
        and chain.middle_understand == "a white seabird on green grass"
    )
    assert (
        chain.final_understand == "a large white at the lower left"
    )  # "zebra" is not in this vocabulary
    assert chain.labels == data.labels[0]
    assert torch.equal(chain.final_image, chains.tokenizer.encode(data.hr.float() / 255)[0])


def test_captions_are_cut_and_photos_without_known_words_left_out(folder, tiny, words):
    chains = shards.ChainRows(*tiny[:2], words, most_words=2)
    notes = folders.read_captions(folder)
    notes["1.png"]["captions"] = ["zebra", "zebra crossing", "bird"]
    data, _ = sources.pairs(sources.open_source(folder).take(2), notes=notes)
    rows, skipped = chains(data)
    assert [r["file"] for r in rows] == ["0.png"] and [s["file"] for s in skipped] == ["1.png"]
    assert vlcot.parse(words.decode(rows[0]["input_ids"])).rough_understand == "a bird"
    none, skipped = chains(
        sources.pairs(sources.open_source(folder).take(1))[0]
    )  # no notes: no captions
    assert none == [] and len(skipped) == 1


def test_plain_words():
    assert shards.plain_words("The dog's re-run, no. 2 – ÄÖ") == [
        "the",
        "dog's",
        "re-run",
        "no",
        "2",
    ]


def test_prompt_rows_have_the_columns_of_grpo(folder, tiny, words):
    from realsr_r1.first import grpo, rewards

    encode = shards.PromptRows(tiny[1], words, keep_hr=128)
    data, _ = sources.pairs(
        sources.open_source(folder).take(2), notes=folders.read_captions(folder)
    )
    rows, _ = encode(data)
    known = grpo.prompts(range(2), tiny[1], words)
    assert set(known.column_names) | {"file"} == set(rows[0])
    assert len(rows[0]["prompt"].split()) == len(known[0]["prompt"].split())
    assert rewards.degradation_reward(
        [f"<degradation> {rows[0]['degradation']} </degradation>"], [rows[0]["degradation"]]
    ) == [1.0]
    assert rows[0]["tags"] == ["bird", "grass"]
    stored = next(
        iter(
            shards.on_the_fly(
                sources.open_source(folder), encode, notes=folders.read_captions(folder)
            )
        )
    )
    assert torch.equal((rewards.hr_image(stored["hr"]) * 255).round().byte(), data.hr[0])


def test_on_the_fly_gives_what_the_files_hold(folder, chains, tmp_path, caplog):
    notes = folders.read_captions(folder)
    live = list(shards.on_the_fly(sources.open_source(folder), chains, notes=notes, batch=3))
    assert "left out 6.png: no captions" in caplog.text
    total = shards.write_shards(folder, tmp_path / "out", chains, notes=notes, photos_per_file=4)
    assert total == {"photos": 7, "rows": 6, "skipped": 1}
    assert list(shards.read_shards(tmp_path / "out")) == live
    assert json.loads((tmp_path / "out" / "rows-00000-of-00001-00001.json").read_text())[
        "skipped"
    ] == [{"file": "6.png", "why": "no captions"}]


def test_a_killed_process_goes_on_and_gives_the_same_files(folder, chains, tmp_path, monkeypatch):
    options = {"notes": folders.read_captions(folder), "photos_per_file": 2}
    shards.write_shards(folder, tmp_path / "whole", chains, **options)
    real, files = shards._write_one, []

    def dies(path, *rest):
        files.append(path.name)
        if len(files) == 3:
            path.with_suffix(".parquet.part").write_bytes(b"half")
            raise KeyboardInterrupt
        return real(path, *rest)

    monkeypatch.setattr(shards, "_write_one", dies)
    with pytest.raises(KeyboardInterrupt):
        shards.write_shards(folder, tmp_path / "out", chains, **options)
    with pytest.raises(ValueError, match=r"shards \[0\] of 1 in .* are not finished"):
        shards.read_shards(tmp_path / "out")
    total = shards.write_shards(folder, tmp_path / "out", chains, **options)
    assert [f[-9:-8] for f in files] == [
        "0",
        "1",
        "2",
        "2",
        "3",
    ]  # the two finished files are not made again
    assert total == {"photos": 7, "rows": 6, "skipped": 1}
    assert list(shards.read_shards(tmp_path / "out")) == list(
        shards.read_shards(tmp_path / "whole")
    )
    shards.write_shards(folder, tmp_path / "out", chains, **options)  # once more: nothing to do
    assert len(files) == 5


def test_two_processes_give_what_one_gives(folder, chains, tmp_path):
    notes = folders.read_captions(folder)
    shards.write_shards(folder, tmp_path / "one", chains, notes=notes)
    shards.write_shards(folder, tmp_path / "two", chains, notes=notes, shard=(0, 2))
    with pytest.raises(ValueError, match=r"shards \[1\] of 2"):
        shards.read_shards(tmp_path / "two")
    shards.write_shards(folder, tmp_path / "two", chains, notes=notes, shard=(1, 2))
    one, two = (
        sorted(shards.read_shards(tmp_path / d), key=lambda r: r["file"]) for d in ("one", "two")
    )
    assert one == two
    data = shards.read_shards(tmp_path / "two")
    assert data.num_shards == 2 and len(list(data.shard(2, 1))) == 3


def test_other_settings_photos_or_names_are_refused(folder, chains, tmp_path):
    notes, out = folders.read_captions(folder), tmp_path / "out"
    with pytest.raises(ValueError, match="none of 7 photos is named in the captions"):
        shards.write_shards(
            folder, tmp_path / "wrong", chains, notes={f"in/{f}": n for f, n in notes.items()}
        )
    shards.write_shards(folder, out, chains, notes=notes)
    for change in ({"recipe": sources.Recipe(seed=1)}, {"shard": (0, 2)}, {"photos_per_file": 5}):
        with pytest.raises(
            ValueError,
            match="holds rows of another recipe, encoder, number of processes or file size",
        ):
            shards.write_shards(folder, out, chains, notes=notes, **change)
    with pytest.raises(ValueError, match="of another recipe, encoder"):
        shards.write_shards(
            folder,
            out,
            shards.ChainRows(chains.tokenizer, chains.reader, chains.vocabulary, most_words=3),
            notes=notes,
        )
    (folder / "3.png").unlink()
    with pytest.raises(
        ValueError, match=r"no longer those that rows-00000-of-00001-00000\.parquet was made from"
    ):
        shards.write_shards(folder, out, chains, notes=notes)
    with pytest.raises(ValueError, match="holds no rows: write them"):
        shards.read_shards(tmp_path / "elsewhere")


def test_a_folder_of_which_nothing_could_be_used(folder, chains, tmp_path):
    total = shards.write_shards(
        folder, tmp_path / "out", chains
    )  # no captions given: no chain can be made
    assert total == {"photos": 7, "rows": 0, "skipped": 7}
    with pytest.raises(ValueError, match="has no rows, all photos were left out"):
        shards.read_shards(tmp_path / "out")


@pytest.mark.parametrize("how", ["streamed", "copied", "on the fly"])
def test_sft_trains_on_them(folder, chains, tiny, tmp_path, how):
    notes = folders.read_captions(folder)
    if how == "on the fly":
        data = shards.on_the_fly(sources.open_source(folder), chains, notes=notes)
    else:
        shards.write_shards(folder, tmp_path / "rows", chains, notes=notes)
        data = shards.read_shards(tmp_path / "rows", streaming=how == "streamed")
    sft.train_sft(
        data,
        None,
        tmp_path / "policy",
        *tiny[:2],
        config=tiny[2].nano,
        batch=2,
        max_steps=2,
        device="cpu",
    )
    trained, fresh = policy.load(tmp_path / "policy"), policy.build(tiny[2].nano)
    assert not torch.allclose(
        trained.model.layers[0].mlp.up_proj.weight,
        fresh.model.layers[0].mlp.up_proj.weight,
        atol=1e-3,
    )


@pytest.mark.parametrize(
    ("processes", "photos_per_file", "files"), [(1, 7, 1), (1, 8, 1), (9, 2, 7), (2, 2, 4)]
)
def test_any_number_of_processes_and_files(
    folder, tiny, words, tmp_path, processes, photos_per_file, files
):
    """Seven photos: files that they fill exactly, processes that get none."""
    encode = shards.PromptRows(tiny[1], words, keep_hr=128)
    for _ in range(2):  # the second time, everything is there
        for i in range(processes):
            shards.write_shards(
                folder,
                tmp_path / "rows",
                encode,
                shard=(i, processes),
                photos_per_file=photos_per_file,
            )
    assert len(list((tmp_path / "rows").glob("*.parquet"))) == files and not list(
        (tmp_path / "rows").glob("*.part")
    )
    rows = sorted(shards.read_shards(tmp_path / "rows"), key=lambda r: r["file"])
    assert [r["file"] for r in rows] == [f"{i}.png" for i in range(7)]
    data, _ = sources.pairs(sources.open_source(folder))
    assert np.array_equal(
        np.asarray(rows[6]["hr"]), data.hr[6].numpy()
    )  # pixels come back from the file as they were


def test_grpo_takes_its_prompts_from_the_files(folder, tiny, words, tmp_path):
    from realsr_r1.first import grpo, rewards

    shards.write_shards(
        folder,
        tmp_path / "rows",
        shards.PromptRows(tiny[1], words),
        notes=folders.read_captions(folder),
    )
    policy.save(tiny[2], tmp_path / "sft")
    policy_folder, data = tmp_path / "sft", shards.read_shards(tmp_path / "rows", streaming=False)
    settings = grpo.GrpoSettings(
        steps=1, prompts=2, group=2, micro_batch=4, words=8, beta=0.0, save_steps=100
    )
    functions = [rewards.degradation_reward, rewards.understanding_reward]
    grpo.train_grpo(policy_folder, data, functions, tmp_path / "grpo", settings, device="cpu")
    assert policy.load(tmp_path / "grpo").nano == tiny[2].nano
    assert "reward" in (tmp_path / "grpo.csv").read_text().splitlines()[0]

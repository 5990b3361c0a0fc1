import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from realsr_r1.ablations import figure as ablate_figure
from realsr_r1.ablations import grpo as ablate
from realsr_r1.ablations import sft as ablate_sft
from realsr_r1.ablations.grpo import GRPO, HACK, Bench, Budget, Store
from realsr_r1.first import grpo, policy, rewards, scenes, sft, tokenizer, vlcot
from realsr_r1.first.__main__ import main
from realsr_r1.first.policy import Sampled
from realsr_r1.first.restore import Models

TINY = Budget(steps=1, prompts=1, group=2)


@pytest.fixture(scope="module")
def bench(tiny, pairs, tmp_path_factory):
    vq, reader, lm = tiny
    folder = tmp_path_factory.mktemp("weights")
    model = policy.build(replace(lm.nano, max_words=14), seed=3).eval()
    policy.save(model, folder / "policy-sft")
    guided = tokenizer.GuidedDecoder(width=16, blocks=1).eval()
    few = scenes.Pairs(pairs.hr[:2], pairs.lr[:2], pairs.labels[:2], pairs.scenes[:2])
    return Bench(
        Models(vq, reader, guided, policy.load(folder / "policy-sft")),
        few,
        lambda x: x.mean((1, 2, 3)),
        folder,
        "val",
        "cpu",
    )


def table(path):
    with path.open() as f:
        return list(csv.DictReader(f))


def test_each_variant_changes_what_it_says_and_nothing_else():
    base = ablate.settings_of(GRPO["all"], ablate.BUDGETS["grpo"], 1)
    assert (base.steps, base.prompts, base.group, base.beta, base.seed) == (
        5,
        4,
        8,
        0.02,
        1,
    ) and GRPO["all"].rewards == grpo.PAPER_REWARDS
    for name, variant in GRPO.items():
        s = ablate.settings_of(variant, ablate.BUDGETS["grpo"], 1)
        assert s.prompts * s.group == 32 and (s.steps, s.lr) == (base.steps, base.lr)
        different = {k for k in vars(s) if getattr(s, k) != getattr(base, k)}
        left_out = set(grpo.PAPER_REWARDS) - set(variant.rewards)
        expected = {"no-kl": {"beta"}, "greedy-text": {"greedy_text"}}.get(
            name, {"group", "prompts"} if "group" in name else set()
        )
        assert different == expected
        assert left_out == ({name.removeprefix("no-")} & set(grpo.PAPER_REWARDS))
    assert ablate.settings_of(GRPO["group-16"], ablate.BUDGETS["grpo"], 0).group == 16
    with pytest.raises(ValueError, match="24 chains a step do not divide into groups of 16"):
        ablate.settings_of(GRPO["group-16"], Budget(8, 3), 0)


def test_hacks_are_without_kl_and_each_remedy_is_one_change():
    budget = ablate.BUDGETS["hack"]
    settings = {name: ablate.settings_of(v, budget, 0) for name, v in HACK.items()}
    assert settings["generation"].beta == settings["recall"].beta == 0 and HACK[
        "recall"
    ].rewards == ("understanding",)
    assert settings["generation-kl"].beta == settings["recall-kl"].beta == budget.beta > 0
    assert settings["recall"].words == 40 and settings["generation"].words is None
    assert settings["f1"] == settings["recall"] and HACK["f1"].rewards == ("understanding_f1",)
    assert settings["mix"] == settings["generation"] and HACK["mix"].rewards == grpo.PAPER_REWARDS
    assert (
        HACK["recall-gate"].gate is ablate.caption_gate
        and HACK["generation-gate"].gate is ablate.reading_gate
    )
    assert {name for name, v in HACK.items() if v.lists} == {
        "recall",
        "recall-kl",
        "recall-gate",
        "f1",
    }


def test_the_caption_gate_closes_on_a_list_of_words():
    say = "<rough_understand> {} </rough_understand>".format
    assert ablate.caption_gate(
        [say("a bird on grass"), say("a bird grass sand road wall"), say(""), ""]
    ) == [1.0, 0.0, 0.0, 0.0]


def test_the_reading_gate_closes_on_two_wrong_labels():
    true = "heavy blur, downsample, heavy noise, light compression, upsample"
    say = "<degradation> {} </degradation>".format
    wrong = [true, true.replace("heavy noise", "no noise"), true.replace("heavy", "no")]
    assert ablate.reading_gate([*map(say, wrong), ""], [true] * 4) == [1.0, 1.0, 0.0, 0.0]


def walk(grammar, batch, seed=0):
    g, state, out = torch.Generator().manual_seed(seed), grammar.start(batch), []
    for _ in range(grammar.max_length):
        word = torch.multinomial(grammar.allowed(state).float(), 1, generator=g)[:, 0]
        out.append(word)
        state = grammar.step(state, word)
    return torch.stack(out, 1), state


@pytest.mark.parametrize(("name", "tags"), ablate_sft.LAYOUTS.items())
def test_layouts_keep_the_sizes_of_their_images(words, name, tags):
    ids, _ = walk(vlcot.LayoutGrammar(words, (2, 3, 4), tags), 2)
    sides = dict(zip(vlcot.IMAGE_TAGS, (2, 3, 4), strict=True))
    for row in ids:
        chain = vlcot.parse(words.decode(row))
        for tag in vlcot.TAGS:
            part = getattr(chain, tag)
            assert (part is not None) == (tag in tags)
            assert tag not in tags or tag not in sides or part.shape == (sides[tag],) * 2


def test_tokens_of_a_layout_are_the_whole_chain_without_the_other_parts(
    pairs, tiny, words, tmp_path
):
    data = scenes.Pairs(pairs.hr[:2], pairs.lr[:2], pairs.labels[:2], pairs.scenes[:2])

    def text(**options):
        row = sft.chains(data, tiny[0], tiny[1], words, cache=tmp_path, **options)[1]
        return words.decode(row["labels"][row["labels"] != -100].tolist())

    whole = vlcot.parse(text())
    for tags in ablate_sft.LAYOUTS.values():
        part = text(tags=tags, direct=tags == ("final_image",))
        chain = vlcot.parse(part)
        assert [w for w in part.split() if w[1:-1] in vlcot.TAGS] == [f"<{t}>" for t in tags]
        assert all(str(getattr(chain, t)) == str(getattr(whole, t)) for t in tags)
    assert len(list(tmp_path.glob("*.npz"))) == len(ablate_sft.LAYOUTS)
    for bad in (("final_image", "degradation"), ("degradation",)):
        with pytest.raises(ValueError, match="parts of the chain in their order"):
            text(tags=bad)


def test_told_text_is_forced_row_by_row_and_the_rest_stays_free(words):
    base = vlcot.LayoutGrammar(words, (2, 3, 4))
    told = [
        {"rough_understand": "a bird on grass", "final_understand": "a"},
        {},
        {"rough_understand": "a fish in water"},
    ]
    grammar = ablate_sft.ToldGrammar(base, told)
    ids, state = walk(grammar, 3)
    chains = [vlcot.parse(words.decode(row)) for row in ids]
    assert all(c.complete for c in chains) and (state == grammar.final).all()
    assert [chains[0].rough_understand, chains[0].final_understand, chains[2].rough_understand] == [
        "a bird on grass",
        "a",
        "a fish in water",
    ]
    free = walk(base, 3)[0]
    assert torch.equal(ids[1], free[1])  # a row that is told nothing moves as in the plain grammar
    assert len({str(c.final_image) for c in chains}) == 3
    forced = [words.words[int(w)] for w in ids[0][grammar.forced_mask(ids)[0]]]
    assert "grass" in forced and not any(w.startswith("<c") for w in forced)
    with pytest.raises(ValueError, match="has 25 words, its part holds 24"):
        ablate_sft.ToldGrammar(base, [{"degradation": "no " * 25}])
    ablate_sft.ToldGrammar(base, [{"degradation": "no " * 24}])
    with pytest.raises(ValueError, match="told to 3 rows"):
        grammar.start(2)


def test_told_texts_are_the_scenes_own_or_the_next_ones(pairs):
    true, wrong = (ablate_sft.told_texts(name, pairs) for name in ("true", "wrong"))
    assert true[2]["rough_understand"] == pairs.scenes[2].captions[0] and len(true[2]) == 4
    assert wrong[2] == true[3] and wrong[-1] == true[0]
    assert not any(ablate_sft.told_texts("own", pairs))
    assert set(ablate_sft.told_texts("true-degradation", pairs)[0]) == {"degradation"}
    assert set(ablate_sft.told_texts("wrong-captions", pairs)[0]) == set(vlcot.TEXT_TAGS[1:])


def test_runs_train_what_is_left_and_are_scored_on_the_same_scenes(
    bench, tmp_path, monkeypatch, capsys
):
    go = {"bench": bench, "out": tmp_path, "seeds": [0], "budget": TINY}
    ablate.run_grpo("grpo", what=["no-generation", "greedy-text"], **go)
    found = {r["variant"]: r for r in table(tmp_path / "grpo.csv")}
    assert (
        set(found) == {"policy-sft", "no-generation", "greedy-text"}
        and found["policy-sft"]["scenes"] == "2"
    )
    record = Store(tmp_path, "grpo").scores("greedy-text", 0)["scores"]
    assert float(found["greedy-text"]["LPIPS"]) == pytest.approx(sum(record["LPIPS"]) / 2, abs=1e-6)
    log = table(tmp_path / "grpo" / "no-generation_0.csv")[0]
    assert "rewards/generation_reward/mean" not in log and "rewards/format_reward/mean" in log
    dead = table(tmp_path / "grpo" / "greedy-text_0.csv")[0]
    assert (
        float(dead["zero_spread/degradation_reward"]) == 1
        and float(dead["zero_spread/generation_reward"]) == 0
    )
    assert not list((tmp_path / "grpo").glob("*checkpoints"))

    def forbidden(*_a, **_k):
        raise AssertionError("trained again")

    monkeypatch.setattr(grpo, "train_grpo", forbidden)
    monkeypatch.setattr(ablate, "score", forbidden)
    capsys.readouterr()
    ablate.run_grpo("grpo", what=["no-generation", "greedy-text"], **go)
    assert capsys.readouterr().out.count("done before") == 3
    # other scenes: scored anew, not trained anew
    monkeypatch.setattr(ablate, "score", lambda models, b: {"LPIPS": [1.0] * len(b.data)})
    one = scenes.Pairs(
        bench.data.hr[:1], bench.data.lr[:1], bench.data.labels[:1], bench.data.scenes[:1]
    )
    ablate.run_grpo("grpo", what=["greedy-text"], **go | {"bench": replace(bench, data=one)})
    assert Store(tmp_path, "grpo").scores("greedy-text", 0)["scores"] == {"LPIPS": [1.0]}
    with pytest.raises(
        ValueError,
        match=r"greedy-text_0 was begun with other settings \(lr 0.0002 there, 0.01 here\)",
    ):
        ablate.run_grpo("grpo", what=["greedy-text"], **go | {"budget": replace(TINY, lr=1e-2)})
    with pytest.raises(ValueError, match="no variant 'beauty'; choose from all"):
        ablate.run_grpo("grpo", what=["beauty"], **go)


def test_a_run_that_another_process_does_is_left_to_it(tmp_path, capsys):
    store = Store(tmp_path, "grpo")
    store.path("a", 0).parent.mkdir(parents=True)
    with FileLock(store.path("a", 0, ".lock")):
        ablate.each(store, ["a", "b"], [0], {"n": 1}, lambda *_: {"LPIPS": [0.5]})
    assert "a_0: another process is at it" in capsys.readouterr().out
    assert store.scores("a", 0) is None and store.scores("b", 0)["scores"] == {"LPIPS": [0.5]}
    ablate.each(store, ["a"], [0], {"n": 1}, lambda *_: {"LPIPS": [0.25]})
    assert [(r["variant"], r["LPIPS"]) for r in table(tmp_path / "grpo.csv")] == [
        ("a", "0.25"),
        ("b", "0.5"),
    ]


def test_signs_of_gaming_by_hand_and_a_curve_that_goes_on(bench, monkeypatch, tmp_path):
    v, g = bench.models.policy.vocabulary, torch.Generator().manual_seed(0)
    images = [torch.randint(0, 64, (n, n), generator=g) for n in (4, 8, 16)]
    category, background = bench.data.scenes[0].tags
    lists = ["a bird on grass", f"{category} {background} {category} the sand road"]

    def fake(model, prompts, *_):
        chains = [
            vlcot.Chain(
                "no blur, keep, no noise, no compression, keep",
                t,
                images[0],
                "a",
                images[1],
                "a",
                images[2],
            )
            for t in lists
        ]
        rows = [v.encode(vlcot.render(c)) for c in chains]
        n = max(map(len, rows))
        ids = torch.tensor([r + [0] * (n - len(r)) for r in rows])
        return Sampled(ids, None, None)

    monkeypatch.setattr(policy, "sample", fake)
    same = scenes.Pairs(
        bench.data.hr[:1].repeat(2, 1, 1, 1),
        bench.data.lr[:1].repeat(2, 1, 1, 1),
        [bench.data.labels[0]] * 2,
        [bench.data.scenes[0]] * 2,
    )
    found = ablate.gaming(
        bench.models,
        same,
        {"nano": lambda x: x.mean((1, 2, 3)), "piqe": lambda x: torch.full((len(x),), 0.25)},
    )
    assert found["words"] == 5 and found["piqe"] == 0.25
    hit = sum(t in lists[0].split() for t in (category, background)) / 2
    assert found["recall"] == pytest.approx((hit + 1) / 2)
    assert found["things"] == (2 + len({category, background, "sand", "road"})) / 2
    plain = bench.models.tokenizer.decode(images[2][None])
    assert found["nano"] == pytest.approx(float(plain.mean()), abs=1e-6)

    class State:
        is_world_process_zero, global_step = True, 0

    state, path = State(), tmp_path / "x.curve.csv"
    curve = ablate.Curve(path, bench.models, same, {"nano": lambda x: x.mean((1, 2, 3))}, 2)
    for state.global_step in range(4):
        curve.on_step_begin(None, state, None, bench.models.policy)
    assert [r["step"] for r in table(path)] == ["0", "2"]
    again = ablate.Curve(path, bench.models, same, {"nano": lambda x: x.mean((1, 2, 3))}, 2)
    state.global_step = 2  # resumed from a checkpoint before the row was written
    again.on_step_begin(None, state, None, bench.models.policy)
    state.global_step = 3
    again.on_train_end(None, state, None, bench.models.policy)
    assert [r["step"] for r in table(path)] == ["0", "2", "3"] and float(
        table(path)[2]["words"]
    ) == 5


def test_a_hacking_run_keeps_its_curve_and_pictures(bench, tmp_path):
    ablate.run_grpo("hack", bench, tmp_path, ["generation"], [0], replace(TINY, prompts=2), probe=1)
    made = {p.name for p in (tmp_path / "hack").glob("generation_0*")}
    assert {
        "generation_0.curve.csv",
        "generation_0_0000.png",
        "generation_0_0001.png",
        "generation_0.scores.json",
    } <= made
    assert [r["step"] for r in table(tmp_path / "hack" / "generation_0.curve.csv")] == ["0", "1"]
    assert "kl" not in {k for k, v in table(tmp_path / "hack" / "generation_0.csv")[0].items() if v}
    ablate.run_grpo("hack", bench, tmp_path, ["recall"], [0], replace(TINY, prompts=2), probe=1)
    kept = json.loads((tmp_path / "hack" / "recall_0.settings.json").read_text())
    assert (
        kept["lists"]
        and kept["gate"] is None
        and (tmp_path / "hack" / "talkative" / "nano.json").exists()
    )


def test_a_listed_scene_names_its_tags_among_other_things():
    plain = scenes.scene(5, "train")
    listed = ablate.Listed(**vars(plain))
    said = listed.captions[0].split()
    assert len(said) == len(set(said)) == 8 and set(plain.tags) < set(said) <= rewards.tag_nouns()
    assert (
        listed.captions == ablate.Listed(**vars(plain)).captions
        and listed.captions[1:] == plain.captions[1:]
    )


def test_layouts_are_fine_tuned_once_and_measured(bench, tmp_path, monkeypatch):
    go = {
        "bench": bench,
        "out": tmp_path,
        "what": ["no-text", "direct"],
        "seeds": [0],
        "budget": ablate_sft.SftBudget(steps=1, batch=2),
    }
    ablate_sft.run_sft(**go)
    found = {r["variant"]: r for r in table(tmp_path / "sft.csv")}
    assert set(found) == {"no-text", "direct"} and float(found["direct"]["PSNR"]) > 0
    for name in found:
        assert not Store(tmp_path, "sft").scores(name, 0)["scores"].keys() & {
            "degradation",
            "understanding",
        }
    before = policy.load(bench.weights / "policy-sft").state_dict()
    assert any(
        not torch.equal(v, before[k])
        for k, v in policy.load(tmp_path / "sft" / "direct_0").state_dict().items()
    )
    monkeypatch.setattr(sft, "train_sft", lambda *_a, **_k: pytest.fail("trained again"))
    ablate_sft.run_sft(**go)
    (
        tmp_path / "sft" / "direct_0.scores.json"
    ).unlink()  # killed while it was measured: the policy is kept
    monkeypatch.setattr(ablate_sft, "measure", lambda *_a: {"LPIPS": [0.0]})
    ablate_sft.run_sft(**go)
    assert Store(tmp_path, "sft").scores("direct", 0)["scores"] == {"LPIPS": [0.0]}


def test_told_and_sampled_differently(bench, tmp_path):
    ablate_sft.run_inference("text", bench, tmp_path, ["true"], [0])
    record = Store(tmp_path, "text").scores("true", 0)["scores"]
    assert record["degradation"] == [1.0, 1.0] and record["understanding"] == [1.0, 1.0]
    ablate_sft.run_inference("sampling", bench, tmp_path, ["default", "greedy-images"], [0, 1])
    rows = {(r["variant"], r["seed"]): r["LPIPS"] for r in table(tmp_path / "sampling.csv")}
    assert (
        rows["default", "0"] != rows["default", "1"]
        and rows["greedy-images", "0"] == rows["greedy-images", "1"]
    )
    assert len(set(ablate_sft.SAMPLINGS.values())) == len(ablate_sft.SAMPLINGS)


def test_crossed_bootstrap_by_hand():
    same = np.full((3, 5), 0.25)
    assert ablate_figure.crossed_bootstrap(same) == pytest.approx((0.25, 0.25, 0.25))
    # scenes alike, seeds 0, 1, 2: the mean of three draws is 0 or 2 with chance 1/27 each, inside
    # 2.5% at either end
    mean, low, high = ablate_figure.crossed_bootstrap(
        np.array([[0.0] * 4, [1.0] * 4, [2.0] * 4]), 4000
    )
    assert (mean, low, high) == (1.0, 0.0, 2.0)
    # one seed: only scenes are resampled, and the interval narrows with their number
    few, many = (ablate_figure.crossed_bootstrap(np.tile([0.0, 1.0], (1, n))) for n in (5, 200))
    assert few[2] - few[1] > 3 * (many[2] - many[1]) > 0
    with pytest.raises(ValueError, match="seeds by scenes"):
        ablate_figure.crossed_bootstrap(np.zeros(3))


def test_differences_pair_seeds_or_take_the_only_baseline():
    runs = {0: {"LPIPS": [0.3, 0.5]}, 1: {"LPIPS": [0.1, 0.1]}}
    assert np.allclose(
        ablate_figure.difference(runs, {0: {"LPIPS": [0.2, 0.2]}}, "LPIPS"),
        [[0.1, 0.3], [-0.1, -0.1]],
    )
    paired = ablate_figure.difference(
        runs, {1: {"LPIPS": [0.0, 0.3]}, 2: {"LPIPS": [9.0, 9.0]}}, "LPIPS"
    )
    assert np.allclose(paired, [[0.1, -0.2]])
    assert (
        ablate_figure.difference(runs, {}, "LPIPS") is None
        and ablate_figure.difference(runs, runs, "PSNR") is None
    )
    with pytest.raises(ValueError, match="scored on 2 and 3 scenes"):
        ablate_figure.difference(runs, {0: {"LPIPS": [0.0] * 3}}, "LPIPS")


def test_figures_and_table_from_runs(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no finished runs"):
        ablate_figure.draw(tmp_path / "empty", tmp_path)
    for variant, lpips in (("own", 0.5), ("true", 0.25), ("wrong", 0.5)):
        for seed in (0, 1):
            Store(tmp_path, "text").finish(
                variant, seed, {}, {"LPIPS": [lpips, lpips + 0.1], "PSNR": [20.0, 21.0]}
            )
    for variant, dead in (("all", (0.0, 0.5)), ("greedy-text", (1.0, 1.0))):
        store = Store(tmp_path, "grpo")
        store.finish(variant, 0, {}, {"LPIPS": [0.5]})
        rows = "".join(f"{d},{d},0.0\n" for d in dead)
        store.path(variant, 0, ".csv").write_text(
            "reward,kl,zero_spread/degradation_reward,zero_spread/understanding_reward,"
            "zero_spread/generation_reward\n" + "".join(f"1.0,0.1,{r}\n" for r in rows.split())
        )
    for seed, last in ((0, 6.0), (1, 8.0)):
        curve = Store(tmp_path, "hack").path("recall", seed, ".curve.csv")
        curve.parent.mkdir(exist_ok=True)
        curve.write_text(f"step,{','.join(ablate_figure.CURVES)}\n0{',4' * 8}\n5{f',{last}' * 8}\n")
    for step, shade in (("0000", 0), ("0012", 200)):
        Image.new("RGB", (40, 8), (shade,) * 3).save(tmp_path / "hack" / f"generation_0_{step}.png")
    figures = tmp_path / "figures"
    lines = ablate_figure.draw(tmp_path, figures)
    assert "| true - own | 2 | **-0.250 [-0.250, -0.250]** | +0.000 [+0.000, +0.000] |  |" in lines
    assert "| wrong - own | 2 | +0.000 [+0.000, +0.000] | +0.000 [+0.000, +0.000] |  |" in lines
    assert "| all | 25% | 25% | 0% |" in lines and "| greedy-text | 100% | 100% | 0% |" in lines
    assert (figures / "ablations.md").read_text().splitlines() == lines
    made = {p.name for p in figures.glob("*.webp")}
    assert made == {
        f"ablation_{n}.webp"
        for n in ("told_text", "text_in_rollouts", "training", "hack_curves", "hack_pictures")
    }
    assert Image.open(figures / "ablation_hack_pictures.webp").size == (40, 16)
    assert [
        (r["variant"], r["step"], r["words"]) for r in table(figures / "ablation_hack_curves.csv")
    ] == [("recall", "0", "4.0"), ("recall", "5", "7.0")]
    logged = {
        (r["variant"], r["step"]): r["zero_spread/degradation_reward"]
        for r in table(figures / "ablation_training.csv")
    }
    assert logged["greedy-text", "1"] == "1.0" and len(logged) == 4
    assert (figures / "ablation_text.csv").read_bytes() == (tmp_path / "text.csv").read_bytes()
    assert ablate_figure.curves_of(tmp_path)["recall"][5]["words"] == [6.0, 8.0]


def test_a_file_is_written_at_once(tmp_path):
    path = tmp_path / "a.json"
    ablate.write(path, "old")
    ablate.write(path, json.dumps([1]))
    assert path.read_text() == "[1]" and list(tmp_path.iterdir()) == [path]


def test_bad_options_get_one_sentence(capsys, tmp_path):
    assert main(["ablate", "text", "--steps", "3"]) == 2
    assert "error: ablate text has no --steps: leave it out" in capsys.readouterr().err
    assert (
        main(["ablate", "figure", "--out", str(tmp_path / "none"), "--figures", str(tmp_path)]) == 2
    )
    assert "no finished runs" in capsys.readouterr().err

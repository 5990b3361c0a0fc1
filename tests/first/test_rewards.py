import inspect

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from realsr_r1 import perceptual
from realsr_r1.first import degradation, rewards, scenes, vlcot
from realsr_r1.first.rewards import (
    GenerationReward,
    ReferenceReward,
    degradation_distance_reward,
    degradation_reward,
    format_reward,
    gated,
    guarded,
    partial_format_reward,
    substring_understanding_reward,
    understanding_f1_reward,
    understanding_reward,
    weighted_sum,
)

TRUE = "medium blur , downsample , heavy noise , light compression , upsample"
TAGS = ["bird", "grass"]


def chain(words=TRUE, rough="a bird on grass", seed=0, sizes=(2, 3, 4), codes=64):
    g = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randint(0, codes, (n, n), generator=g) for n in sizes)
    return vlcot.render(
        vlcot.Chain(
            words,
            rough,
            a,
            "a white bird on green grass",
            b,
            "a small white bird on green grass",
            c,
        )
    )


GOOD = chain()


def spoil(kind):
    body = GOOD[GOOD.index("<rough_understand>") :]
    final = GOOD[GOOD.rindex("<final_image>") :]
    return {
        "empty": "",
        "nonsense": "bird grass <row> </image> <c3> medium blur",
        "twice": f"{GOOD} {GOOD}",
        "no degradation": body,
        "order": f"{body} {GOOD[: GOOD.index('<rough_understand>')]}",
        "words around": f"so {GOOD}",
        "cut in the final image": GOOD[: GOOD.rindex("<c")],
        "cut after the rough text": GOOD[: GOOD.index("<rough_image>")],
        "final image empty": GOOD.replace(final, "<final_image> </final_image>"),
        "final image repeated": f"{GOOD} {final}",
        "a code short": GOOD[: GOOD.rindex("<c")] + GOOD[GOOD.rindex("<row>") :],
        "no pixels": GOOD.replace(
            final, "<final_image> <image> <n2> <n0> <row> <row> </image> </final_image>"
        ),
        "unknown code": GOOD[: GOOD.rindex("<c")] + "<c64> " + GOOD[GOOD.rindex("<row>") :],
        "huge code": GOOD[: GOOD.rindex("<c")] + f"<c{'9' * 5000}> " + GOOD[GOOD.rindex("<row>") :],
        "LR codes": GOOD.replace(final, final.replace("<c", "<l")),
    }[kind]


# What each spoilt chain earns: format, partial format (eighths), degradation, understanding,
# generation (the expert gives 0.5).
TABLE = {
    "empty": (0, 0, 0, 0, 0),
    "nonsense": (0, 0, 0, 0, 0),
    "twice": (0, 0, 0, 0, 0),
    "no degradation": (0, 6, 0, 1, 0.5),
    "order": (0, 7, 1, 1, 0.5),
    "words around": (0, 7, 1, 1, 0.5),
    "cut in the final image": (0, 6, 1, 1, 0),
    "cut after the rough text": (0, 2, 1, 1, 0),
    "final image empty": (0, 6, 1, 1, 0),
    "final image repeated": (0, 6, 1, 1, 0),
    "a code short": (0, 6, 1, 1, 0),
    "unknown code": (1, 8, 1, 1, 0),
    "huge code": (0, 6, 1, 1, 0),
    "LR codes": (0, 6, 1, 1, 0),
}


def half(images):
    return torch.full((len(images),), 0.5)


@pytest.fixture(scope="module")
def vq(tiny):
    return tiny[0]


@pytest.mark.parametrize("kind", TABLE)
def test_what_spoilt_chains_earn(kind, vq):
    texts, names = [spoil(kind)], [TAGS]
    got = (
        *format_reward(texts),
        *partial_format_reward(texts),
        *degradation_reward(texts, [TRUE]),
        *understanding_reward(texts, names),
        *GenerationReward(half, vq)(texts),
    )
    form, eighths, *rest = TABLE[kind]
    assert got == (form, eighths / 8, *rest)


def test_a_good_chain_earns_everything(vq):
    columns = {
        "degradation": [TRUE],
        "tags": [TAGS],
        "prompts": ["p"],
        "completion_ids": [[1]],
        "trainer_state": object(),
    }
    for reward in (
        format_reward,
        partial_format_reward,
        degradation_reward,
        degradation_distance_reward,
        understanding_reward,
        understanding_f1_reward,
        substring_understanding_reward,
        GenerationReward(lambda x: torch.ones(len(x)), vq),
    ):
        assert reward(completions=[GOOD], **columns) == [1.0]


def test_the_papers_example_of_the_degradation_reward():
    # noise and the last resize are wrong
    said = "medium blur, downsample, light noise, light compression, keep"
    assert degradation_reward([chain(said)], [TRUE]) == [0.6]


def test_the_papers_example_of_the_understanding_reward():
    assert understanding_reward(
        [chain(rough="a dog and a ball on grass")], [["dog", "ball", "grass", "tree"]]
    ) == [0.75]


@pytest.mark.parametrize(
    ("said", "exact", "near"),
    [
        (TRUE, 1.0, 1.0),
        (
            "medium blur, downsample, medium noise, light compression, upsample",
            0.8,
            (4 + 2 / 3) / 5,
        ),
        ("medium blur, downsample, no noise, light compression, upsample", 0.8, 0.8),
        ("medium blur, keep, heavy noise, light compression, upsample", 0.8, 0.9),
        (
            "medium blur, upsample, heavy noise, light compression, downsample",
            0.6,
            0.6,
        ),  # the two resizes swapped
        (
            "downsample, heavy noise, light compression, upsample",
            0.0,
            0.0,
        ),  # the first left out: all in the wrong place
        ("medium blur, downsample", 0.4, 0.4),
        ("medium blur, downsample, heavy noise, light compression, upsample, keep", 1.0, 1.0),
        ("heavy blur, heavy blur, heavy blur, heavy blur, heavy blur", 0.0, 2 / 3 / 5),
        ("blur", 0.0, 0.0),
    ],
)
def test_degradation_rewards_by_hand(said, exact, near):
    assert degradation_reward([chain(said)], [TRUE]) == [pytest.approx(exact)]
    assert degradation_distance_reward([chain(said)], [TRUE]) == [pytest.approx(near)]


def test_labels_come_as_sentence_or_as_dict_and_survive_a_dataset():
    labels = degradation.from_words(TRUE)
    rows = Dataset.from_dict({"degradation": [labels, labels], "tags": [TAGS, ["bird"]]})
    wrong = chain(
        "no blur, downsample, heavy noise, light compression, upsample", "a bird against wall"
    )
    assert (
        degradation_reward([GOOD, wrong], rows["degradation"])
        == degradation_reward([GOOD, wrong], [TRUE, TRUE])
        == [1.0, 0.8]
    )
    assert understanding_reward([GOOD, wrong], rows["tags"]) == [1.0, 1.0]
    assert understanding_f1_reward([GOOD, wrong], rows["tags"]) == [1.0, pytest.approx(2 / 3)]


EVERYTHING = " ".join(sorted(rewards.tag_nouns()))


# rough text, tags, recall, F1, substring
@pytest.mark.parametrize(
    ("rough", "tags", "recall", "f1", "inside"),
    [
        ("a bird on grass", ["bird", "grass"], 1, 1, 1),
        ("a bird on sand", ["bird", "grass"], 0.5, 2 * 1 / (2 + 2), 0.5),
        (
            "a seabird on grass",
            ["bird", "grass"],
            0.5,
            2 * 1 / (1 + 2),
            1,
        ),  # "bird" is inside "seabird"; kinds are free
        ("a woman with a scarf", ["car"], 0, 0, 1),  # the released code finds the car
        ("a Bird, on Grass", ["BIRD", "grass"], 1, 1, 1),
        ("a bird bird bird on grass", ["bird", "bird", "grass"], 1, 1, 1),
        ("a bird on lawn", ["bird", "grass"], 1, 1, 0.5),  # a synonym
        ("birds in sea", ["bird", "ocean"], 1, 1, 0.5),
        ("a polar bear on grass", ["polar bear"], 1, 2 * 1 / (2 + 1), 1),
        ("a bear in polar water", ["polar bear"], 0, 0, 0),
        ("a t-shirt", ["T_shirt"], 1, 1, 0),
        # Words outside the nano vocabulary count, too: two hits of six things.
        ("a dog ball lamp sofa pencil bottle", ["dog", "ball"], 1, 2 * 2 / (6 + 2), 1),
        (
            EVERYTHING,
            ["bird", "grass"],
            1,
            2 * 2 / (21 + 2),
            1,
        ),  # listing every word pays in recall, not in F1
        ("a bird on grass", [], 0, 0, 0),
        ("a dog", ["bird", "grass"], 0, 0, 0),
    ],
)
def test_understanding_rewards_by_hand(rough, tags, recall, f1, inside):
    text = [chain(rough=rough)]
    assert understanding_reward(text, [tags]) == [recall]
    assert understanding_f1_reward(text, [tags]) == [pytest.approx(f1)]
    assert substring_understanding_reward(text, [tags]) == [inside]


def test_understanding_looks_at_the_rough_text_alone():
    assert understanding_reward([chain(rough="a thing")], [["bird", "green"]]) == [0.0]


def test_synonyms_leave_the_nano_vocabulary_alone_and_do_not_chain():
    assert not set(rewards.SYNONYMS) & set(vlcot.Vocabulary().text)
    assert not set(rewards.SYNONYMS) & set(rewards.SYNONYMS.values())


def test_every_true_scene_earns_full_marks(pairs):
    texts = [
        chain(degradation.to_words(lab), s.captions[0])
        for lab, s in zip(pairs.labels, pairs.scenes, strict=True)
    ]
    tags, n = [s.tags for s in pairs.scenes], len(pairs)
    assert (
        understanding_reward(texts, tags)
        == understanding_f1_reward(texts, tags)
        == degradation_reward(texts, pairs.labels)
        == [1.0] * n
    )
    assert {t for names in tags for t in names} <= rewards.tag_nouns()


def test_what_the_policys_tokenizer_decodes_is_scored(words):
    ids = words.encode(chain(rough="a bird on grass").replace("white bird", "white seabird"))
    text = words.tokenizer.batch_decode(
        [[*ids, words.ids[vlcot.EOS], 0, 0]], skip_special_tokens=True
    )
    assert (
        format_reward(text)
        == degradation_reward(text, [TRUE])
        == understanding_reward(text, [TAGS])
        == [1.0]
    )


def test_conversations_are_read_by_their_content(vq):
    said = [
        [{"role": "assistant", "content": GOOD}],
        [{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}],
        [],
        [{"role": "assistant", "content": None}],
    ]
    assert format_reward(said) == [1.0, 1.0, 0.0, 0.0]
    assert (
        degradation_reward(said, [TRUE] * 4)
        == understanding_reward(said, [TAGS] * 4)
        == [1.0, 1.0, 0.0, 0.0]
    )
    assert GenerationReward(half, vq)(said) == [0.5, 0.5, 0.0, 0.0]


# ---------------------------------------------------------------- images


def test_generation_reward_scores_the_decoded_final_image(vq):
    texts = [chain(seed=i) for i in range(5)]
    sizes = []

    def mean(images):
        sizes.append(len(images))
        assert not torch.is_grad_enabled() and images.shape[1:] == (3, 32, 32)
        return images.mean((1, 2, 3))

    got = GenerationReward(mean, vq, batch=2)([texts[0], "", *texts[1:]])
    assert sizes == [2, 2, 1] and got.pop(1) == 0.0
    with torch.no_grad():
        alone = [float(vq.decode(vlcot.parse(t).final_image[None]).mean()) for t in texts]
    assert got == pytest.approx(alone, abs=1e-5) and len(set(got)) == 5


def test_an_image_without_pixels_scores_zero(vq):
    assert GenerationReward(half, vq)([spoil("no pixels")]) == [0.0]


def test_final_images_of_several_sizes_and_the_size_asked_for(vq):
    texts = [chain(sizes=(2, 3, n)) for n in (4, 5, 4)]
    assert GenerationReward(half, vq)(texts) == [0.5, 0.5, 0.5]
    assert GenerationReward(half, vq, size=4)(texts) == [0.5, 0.0, 0.5]


@pytest.mark.parametrize(
    "expert", [lambda x: 0.5, lambda x: torch.ones(len(x), 1), lambda x: torch.tensor(0.5)]
)
def test_an_expert_of_the_wrong_shape_is_named(vq, expert):
    with pytest.raises(
        ValueError, match="the expert must return a tensor of one score for each of 2 images"
    ):
        GenerationReward(expert, vq)([GOOD, GOOD])


def test_reference_reward_is_one_minus_lpips(vq):
    texts = [chain(seed=i, sizes=(4, 8, 16)) for i in range(2)]
    with torch.no_grad():
        own = [vq.decode(vlcot.parse(t).final_image[None])[0] for t in texts]
    reward = ReferenceReward(vq)
    assert reward(texts, hr=own) == pytest.approx([1.0, 1.0], abs=1e-5)  # the truth itself
    photo = scenes.scene(1_000_003, "val").image
    expected = (1 - perceptual.distance(own[1][None], photo[None])).clamp(0, 1).item()
    pixels = (photo * 255).byte()
    row = {"seed": 1_000_003, "split": "val"}
    for hr in (
        photo,
        pixels,
        pixels.numpy(),
        pixels.tolist(),
        row,
        Dataset.from_dict({"hr": [row]})["hr"][0],
    ):
        assert reward([texts[1]], hr=[hr]) == pytest.approx([expected], abs=1e-5)
    assert reward(["", GOOD], hr=[photo, photo]) == [0.0, 0.0]  # no image; an image of another size


def test_reference_reward_by_ssim(vq):
    import pyiqa

    texts = [chain(seed=i, sizes=(4, 8, 16)) for i in range(2)]
    with torch.no_grad():
        own = [vq.decode(vlcot.parse(t).final_image[None])[0].clamp(0, 1) for t in texts]
    reward = ReferenceReward(vq, "ssim")
    photo = scenes.scene(1_000_003, "val").image
    expected = (
        pyiqa.create_metric("ssim", device="cpu")(own[1][None], photo[None]).clamp(0, 1).item()
    )
    assert reward([*texts, ""], hr=[own[0], photo, photo]) == pytest.approx(
        [1.0, expected, 0.0], abs=1e-5
    )
    assert reward.__name__ == "reference_ssim_reward" and expected < 0.9
    with pytest.raises(ValueError, match="choose lpips or ssim"):
        ReferenceReward(vq, "psnr")


@pytest.mark.parametrize(
    "hr",
    [
        None,
        "photo.png",
        {"seed": 3},
        {"seed": 3, "split": "moon"},
        torch.zeros(2, 2),
        torch.full((3, 4, 4), 7.0),
        [[1], [1, 2]],
        [],
        300 * np.ones((3, 2, 2), int),
    ],
)
def test_a_malformed_hr_entry_is_named(vq, hr):
    with pytest.raises(ValueError, match="column 'hr', sample 1"):
        ReferenceReward(vq)([GOOD, GOOD], hr=[{"seed": 1, "split": "val", "size": 32}, hr])


# ---------------------------------------------------------------- columns that are missing or wrong


@pytest.mark.parametrize(
    ("reward", "column"),
    [
        (degradation_reward, "degradation"),
        (degradation_distance_reward, "degradation"),
        (understanding_reward, "tags"),
        (understanding_f1_reward, "tags"),
        (substring_understanding_reward, "tags"),
        (ReferenceReward(None), "hr"),
    ],
)
def test_missing_columns_are_named(reward, column):
    for columns in ({}, {column: None}):
        with pytest.raises(
            ValueError, match=f"needs the dataset column '{column}', which is missing"
        ):
            reward(completions=[GOOD], **columns)
    for values in ([], [None, None], "bird", {"a": 1}, 3):
        with pytest.raises(
            ValueError, match=f"column '{column}' must hold one entry for each of the 1 completions"
        ):
            reward(completions=[GOOD], **{column: values})
    with pytest.raises(ValueError, match=f"column '{column}', sample 0: expected"):
        reward(completions=[GOOD], **{column: [None]})


@pytest.mark.parametrize(
    "bad",
    [
        None,
        "",
        "medium blur",
        "very blurry, downsample, heavy noise, light compression, upsample",
        {},
        {"blur": "no"},
        3,
        {**degradation.from_words(TRUE), "noise": None},
        ["medium blur"],
    ],
)
def test_true_labels_that_are_not_five_are_named(bad):
    with pytest.raises(ValueError, match="column 'degradation', sample 1: expected five labels"):
        degradation_reward([GOOD, GOOD], [TRUE, bad])


@pytest.mark.parametrize(
    "bad", ["bird", None, 3, ["bird", None], [""], ["--"], [["bird"]], {"bird": 1}]
)
def test_tags_that_are_no_words_are_named(bad):
    with pytest.raises(ValueError, match="column 'tags', sample 1: expected a list of words"):
        understanding_reward([GOOD, GOOD], [TAGS, bad])


@pytest.mark.parametrize("bad", [None, 3, [3]])
def test_completions_that_are_no_text_are_refused(bad):
    with pytest.raises(ValueError, match="a completion must be a string or a list of messages"):
        format_reward([bad])


# ---------------------------------------------------------------- combining


def give(*values, name="given"):
    def reward(completions, **_):
        return list(values)

    reward.__name__ = name
    return reward


def test_weighted_sum_by_hand():
    a, b = give(1.0, 0.0, 0.5), give(0.0, 1.0, 0.5)
    assert weighted_sum([a, b])(["", "", ""]) == [0.5, 0.5, 0.5]
    assert weighted_sum([a, b], [3, 1])(["", "", ""]) == [0.75, 0.25, 0.5]
    assert weighted_sum([a, b], [0.1, 0.0], name="mix")(["", "", ""]) == pytest.approx(
        [1.0, 0.0, 0.5]
    )
    assert weighted_sum([a, b], name="mix").__name__ == "mix"
    assert weighted_sum([give(1.0)] * 3, [0.1, 0.2, 0.7])([""])[0] <= 1.0
    mix = weighted_sum([degradation_reward, understanding_reward])
    assert mix(completions=[chain(rough="a bird on sand")], degradation=[TRUE], tags=[TAGS]) == [
        0.75
    ]


@pytest.mark.parametrize(
    "weights", [[1], [1, 2, 3], [1, -1], [0, 0], [1, float("nan")], [1, float("inf")]]
)
def test_weights_that_do_not_fit(weights):
    with pytest.raises(
        ValueError, match="weighted_sum needs for each of 2 rewards a finite weight"
    ):
        weighted_sum([format_reward, degradation_reward], weights)


def test_a_gate_lets_only_whole_chains_earn():
    reward = gated(understanding_reward)
    assert reward(completions=[GOOD, spoil("words around"), ""], tags=[TAGS] * 3) == [1.0, 0.0, 0.0]
    assert reward.__name__ == "gated_understanding_reward"
    assert gated(give(0.3, 0.4), give(1.0, 0.99))(["", ""]) == [0.3, 0.0]


def test_names_for_the_log(vq):
    assert (
        GenerationReward(half, vq).__name__ == "generation_reward"
        and ReferenceReward(vq).__name__ == "reference_reward"
    )
    assert gated(GenerationReward(half, vq)).__name__ == "gated_generation_reward"
    assert (
        guarded(understanding_reward).__name__ == "understanding_reward"
        and "tags" in guarded(understanding_reward).__doc__
    )


# ---------------------------------------------------------------- the guard


def test_the_guard_leaves_good_rewards_alone(vq):
    for reward in (understanding_reward, GenerationReward(half, vq)):
        columns = {"completions": [GOOD, "", GOOD], "tags": [TAGS] * 3}
        assert guarded(reward)(**columns) == reward(**columns)
    assert guarded(lambda completions: torch.tensor([0.5, 1.0]))(["", ""]) == [0.5, 1.0]
    assert guarded(lambda completions: np.array([0, 1]))(["", ""]) == [0.0, 1.0]
    assert guarded(give())([]) == []


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), -0.01, 1.01, None, "1", [0.5]]
)
def test_the_guard_names_a_bad_value_and_its_sample(value):
    with pytest.raises(
        ValueError,
        match=r"reward given returned .*, which is not a number in \[0, 1\], on sample 1: 'the "
        r"second'",
    ):
        guarded(give(0.5, value))(completions=["the first", "the second"])


@pytest.mark.parametrize("values", [[0.5], [0.5] * 3, 0.5, None, {1: 2}])
def test_the_guard_names_a_wrong_length(values):
    def odd(completions, **_):
        return values

    with pytest.raises(ValueError) as e:
        guarded(odd)(completions=["the first", "b"])
    assert (
        str(e.value)
        == f"reward odd returned {str(values)!r} instead of 2 values, on sample 0: 'the first'"
    )


def test_the_guard_finds_the_sample_that_raises_and_shortens_it():
    def fussy(completions, tags, trainer_state, **_):
        return [1 / len(t) for t in tags]

    texts = ["short", "x" * 500 + "end"]
    with pytest.raises(ValueError) as e:
        guarded(fussy)(completions=texts, tags=[["a"], []], trainer_state=object())
    message = str(e.value)
    assert (
        "reward fussy stopped with ZeroDivisionError" in message and "on sample 1: 'xxx" in message
    )
    assert message.endswith("xend'") and len(message) < 300 and "\n" not in message
    assert isinstance(e.value.__cause__, ZeroDivisionError)


def test_the_guard_names_the_missing_column():
    with pytest.raises(
        ValueError, match=r"reward understanding_reward stopped .*column 'tags', which is missing"
    ):
        guarded(understanding_reward)(completions=[GOOD])


def test_the_guard_says_so_when_only_the_batch_raises():
    def moody(completions, **_):
        if len(completions) > 1:
            raise KeyError("x")
        return [0.0]

    with pytest.raises(ValueError, match=r"reward moody stopped with KeyError .* on sample 0"):
        guarded(moody)(["a", "b"])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_passes_the_guard(error):
    def hungry(completions, **_):
        raise error("no room")

    with pytest.raises(error):
        guarded(hungry)(["a"])


# ---------------------------------------------------------------- properties

PIECES = [
    *(f"<{t}>" for t in vlcot.TAGS),
    *(f"</{t}>" for t in vlcot.TAGS),
    vlcot.START,
    vlcot.END,
    vlcot.ROW,
    "<n1>",
    "<n0>",
    "<c1>",
    "<c2>",
    "<l1>",
    "bird",
    "grass",
    "a",
    ",",
    "medium",
    "blur",
    "downsample",
    GOOD,
    "<c12345678901234567890>",
    "\n",
]
texts = st.lists(
    st.one_of(st.lists(st.sampled_from(PIECES), max_size=30).map(" ".join), st.text(max_size=60)),
    max_size=4,
)


def all_rewards(vq):
    plain = [
        r for name, r in vars(rewards).items() if name.endswith("_reward") and inspect.isfunction(r)
    ]
    assert len(plain) == 7
    mean = GenerationReward(lambda x: x.mean((1, 2, 3)), vq)
    return [*plain, mean, ReferenceReward(vq), weighted_sum(plain), gated(mean)]


@given(batch=texts, data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_text_gives_floats_in_range_sample_by_sample(vq, batch, data):
    order = data.draw(st.permutations(range(len(batch))))
    n = len(batch)
    rows = {
        "completions": batch,
        "degradation": [TRUE, "no blur, keep, no noise, no compression, keep", TRUE, TRUE][:n],
        "tags": [TAGS, ["car"], [], ["wall", "polar bear"]][:n],
        "hr": [torch.full((3, 32, 32), i / 4) for i in range(n)],
    }
    for reward in all_rewards(vq):
        got = reward(**rows)
        assert (
            isinstance(got, list)
            and len(got) == n
            and all(isinstance(x, float) and 0 <= x <= 1 for x in got)
        )
        again = reward(**{k: [v[i] for i in order] for k, v in rows.items()})
        assert again == pytest.approx([got[i] for i in order], abs=1e-5)
        assert guarded(reward)(**rows) == pytest.approx(got, abs=1e-6)  # again the same: no state


@given(batch=texts)
@settings(max_examples=40, deadline=None)
def test_partial_credit_is_full_exactly_where_the_format_is(batch):
    for whole, part in zip(format_reward(batch), partial_format_reward(batch), strict=True):
        assert (part == 1) == (whole == 1)


LEVELS, RESIZES = st.sampled_from(degradation.LEVELS), st.sampled_from(degradation.RESIZES)
labels = st.fixed_dictionaries(
    {k: RESIZES if "resize" in k else LEVELS for k in degradation.LABELS}
)


@given(said=labels, true=labels)
@settings(max_examples=60, deadline=None)
def test_distance_never_pays_less_than_exactness(said, true):
    text = [f"<degradation> {degradation.to_words(said)} </degradation>"]
    exact, near = degradation_reward(text, [true])[0], degradation_distance_reward(text, [true])[0]
    assert exact == sum(said[k] == true[k] for k in true) / 5
    assert near >= exact - 1e-9 and (near == 1) == (exact == 1)


@given(
    words=st.lists(st.sampled_from(sorted(rewards.tag_nouns())), max_size=8),
    tags=st.sets(st.sampled_from(sorted(rewards.tag_nouns())), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_f1_is_the_textbook_one(words, tags):
    text = [chain(rough="a " + " ".join(words))]
    hits = len(set(words) & tags)
    p, r = hits / max(1, len(set(words))), hits / len(tags)
    assert understanding_reward(text, [sorted(tags)]) == [pytest.approx(r)]
    assert understanding_f1_reward(text, [sorted(tags)]) == [
        pytest.approx(2 * p * r / (p + r) if hits else 0.0)
    ]

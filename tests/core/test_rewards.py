import pytest
import torch

from realsr_r1 import rewards, vlcot
from realsr_r1.ablations.rewards import (
    ReferenceReward,
    degradation_distance_reward,
    gated,
    tag_nouns,
    understanding_f1_reward,
)
from realsr_r1.photographs import ASSETS, load, vocabulary
from realsr_r1.rewards import (
    GenerationReward,
    degradation_reward,
    format_reward,
    guarded,
    understanding_reward,
)
from realsr_r1.tokenizer import TokenizerConfig, VQModel

TRUE = "medium blur, downsample, heavy noise, light compression, upsample"
TAGS = ["bird", "grass"]


def chain(words=TRUE, rough="a bird on grass", seed=0, grids=(2, 3, 4)):
    g = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randint(0, 64, (n, n), generator=g) for n in grids)
    texts = "a white bird on grass", "a near view of a white bird on the left"
    return vlcot.render(vlcot.Chain(words, rough, a, texts[0], b, texts[1], c))


GOOD = chain()
FINAL = GOOD[GOOD.rindex("<final_image>") :]
AFTER = GOOD[GOOD.index("<rough_understand>") :]
# Spoilt chains and what each earns: format, degradation, understanding, generation (the expert
# gives 0.5).
SPOILT = {
    "empty": ("", 0, 0, 0, 0),
    "nonsense": ("bird grass </image> <c3> medium blur", 0, 0, 0, 0),
    "twice": (f"{GOOD} {GOOD}", 0, 0, 0, 0),
    "no degradation": (AFTER, 0, 0, 1, 0.5),
    "order": (f"{AFTER} {GOOD[: -len(AFTER)]}", 0, 1, 1, 0.5),
    "words around": (f"so {GOOD}", 0, 1, 1, 0.5),
    "cut in the image": (GOOD[: GOOD.rindex("<c")], 0, 1, 1, 0),
    "cut after the rough text": (GOOD[: GOOD.index("<rough_image>")], 0, 1, 1, 0),
    "image empty": (GOOD.replace(FINAL, "<final_image> </final_image>"), 0, 1, 1, 0),
    "image repeated": (f"{GOOD} {FINAL}", 0, 1, 1, 0),
    "a code short": (GOOD[: GOOD.rindex("<c")] + "</image> </final_image>", 0, 1, 1, 0),
    "unknown code": (GOOD[: GOOD.rindex("<c")] + "<c64> </image> </final_image>", 1, 1, 1, 0),
    "huge code": (
        f"{GOOD[: GOOD.rindex('<c')]}<c{'9' * 5000}> </image> </final_image>",
        0,
        1,
        1,
        0,
    ),
}


@pytest.fixture(scope="module")
def vq() -> VQModel:
    torch.manual_seed(0)
    widths = {"encoder": (16, 16), "decoder": (16, 16, 16, 16), "lr_width": 16}
    return VQModel(TokenizerConfig(codes=64, **widths)).eval()


def half(images):
    return torch.full((len(images),), 0.5)


@pytest.mark.parametrize("kind", SPOILT)
def test_what_spoilt_chains_earn(kind, vq):
    text, *earned = SPOILT[kind]
    got = (
        *format_reward([text]),
        *degradation_reward([text], [TRUE]),
        *understanding_reward([text], [TAGS]),
        *GenerationReward(half, vq)([text]),
    )
    assert got == tuple(earned)


def test_the_papers_examples():
    said = "medium blur, downsample, light noise, light compression, keep"
    assert degradation_reward([chain(said)], [TRUE]) == [0.6]
    rough = [chain(rough="a dog and a ball on grass")]
    assert understanding_reward(rough, [["dog", "ball", "grass", "tree"]]) == [0.75]


@pytest.mark.parametrize(
    ("said", "exact", "near"),
    [
        (TRUE, 1.0, 1.0),
        (
            "medium blur, downsample, medium noise, light compression, upsample",
            0.8,
            (4 + 2 / 3) / 5,
        ),
        ("medium blur, keep, heavy noise, light compression, upsample", 0.8, 0.9),
        ("medium blur, upsample, heavy noise, light compression, downsample", 0.6, 0.6),
        ("downsample, heavy noise, light compression, upsample", 0.0, 0.0),
        ("medium blur, downsample", 0.4, 0.4),
        ("heavy blur, heavy blur, heavy blur, heavy blur, heavy blur", 0.0, 2 / 3 / 5),
    ],
)
def test_degradation_rewards_by_hand(said, exact, near):
    assert degradation_reward([chain(said)], [TRUE]) == [pytest.approx(exact)]
    assert degradation_distance_reward([chain(said)], [TRUE]) == [pytest.approx(near)]


@pytest.mark.parametrize(
    ("rough", "tags", "recall", "f1"),
    [
        ("a bird on grass", TAGS, 1, 1),
        ("a bird on sand", TAGS, 0.5, 0.5),
        ("birds in the ocean", ["bird", "sea"], 1, 1),  # plural, synonym
        ("tulips among leaves", ["tulip", "leaf"], 1, 1),
        ("a woman with a scarf", ["car"], 0, 0),  # no substrings
        ("a bird bird bird on grass", ["bird", "bird", "grass"], 1, 1),
        ("a wild cat on grass", ["wild cat"], 1, 2 * 1 / (2 + 1)),
        ("a dog ball lamp sofa pencil bottle", ["dog", "ball"], 1, 2 * 2 / (6 + 2)),
        (" ".join(sorted(tag_nouns())), TAGS, 1, None),  # naming all: recall alone is fooled
        ("a bird on grass", [], 0, 0),
    ],
)
def test_understanding_rewards_by_hand(rough, tags, recall, f1):
    text = [chain(rough=rough)]
    assert understanding_reward(text, [tags]) == [recall]
    got = understanding_f1_reward(text, [tags])[0]
    assert got < 0.1 if f1 is None else got == pytest.approx(f1)


def test_synonyms_do_not_chain_and_only_plurals_touch_captions():
    assert not set(rewards.SYNONYMS) & set(rewards.SYNONYMS.values())
    own = set(rewards.SYNONYMS) & set(vocabulary())
    assert all(rewards.SYNONYMS[w][:2] == w[:2] for w in own), own


def test_what_true_captions_of_shipped_photographs_earn():
    photos = load("train", ASSETS)
    texts = [chain(rough=p.captions[0]) for p in photos]
    recall = understanding_reward(texts, [p.tags for p in photos])
    assert all(r > 0 for r in recall)  # the subject is always named
    first = [(p.subject, p.background[0]) for p in photos]
    full = understanding_reward(texts, first)
    named = [r for r, (_, b) in zip(full, first, strict=True) if b != "leaves"]
    assert min(named) == 1.0


@pytest.mark.parametrize("column", ["degradation", "tags", "hr"])
def test_a_missing_column_is_named(column, vq):
    call = {
        "degradation": degradation_reward,
        "tags": understanding_reward,
        "hr": ReferenceReward(vq),
    }[column]
    with pytest.raises(ValueError, match=f"column '{column}'"):
        call([GOOD])


def test_reference_reward_is_highest_for_the_truth(vq):
    hr = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))
    true = vlcot.parse(chain(grids=vlcot.GRIDS))
    true.final_image = vq.encode(hr[None])[0]
    decoded = vq.decode(true.final_image[None])[0].detach()
    other = chain(grids=vlcot.GRIDS, seed=5)
    good, bad = ReferenceReward(vq)([vlcot.render(true), other], hr=[decoded, decoded])
    assert good == pytest.approx(1.0, abs=1e-3) and bad < good
    small, none = chain(grids=(2, 4, 8)), "no chain"
    mixed = ReferenceReward(vq)([other, small, none, vlcot.render(true)], hr=[decoded] * 4)
    assert mixed == pytest.approx([bad, 0, 0, good])  # each its own, 0 where sizes differ


def test_guarded_names_the_reward_and_the_sample():
    def beauty(completions, **_):
        return [0.5, float("nan")]

    with pytest.raises(ValueError, match=r"reward beauty returned nan.*on sample 1"):
        guarded(beauty)(completions=[GOOD, GOOD])

    def short(completions, **_):
        return [0.5]

    with pytest.raises(ValueError, match="instead of 2 values"):
        guarded(short)(completions=[GOOD, GOOD])


def test_a_gate():
    closed = gated(degradation_reward)
    assert closed(completions=[GOOD, "so " + GOOD], degradation=[TRUE, TRUE]) == [1.0, 0.0]

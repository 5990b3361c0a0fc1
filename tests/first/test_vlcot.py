import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realsr_r1.first import vlcot


def chain(seed=0, sizes=(4, 8, 16)):
    g = torch.Generator().manual_seed(seed)
    images = [torch.randint(0, 64, (n, n), generator=g) for n in sizes]
    return vlcot.Chain(
        "medium blur, downsample, heavy noise, light compression, upsample",
        "a bird on grass",
        images[0],
        "a white bird on green grass",
        images[1],
        "a large white bird at the lower left on green grass with trees",
        images[2],
    )


def same(a, b):
    return all(
        torch.equal(x, y)
        if isinstance(x := getattr(a, t), torch.Tensor)
        else x == (y := getattr(b, t))
        for t in vlcot.TAGS
        if (y := getattr(b, t)) is not None
    )


def test_render_then_parse_gives_the_chain_back():
    text = vlcot.render(chain())
    back = vlcot.parse(text)
    assert back.complete and same(chain(), back) and vlcot.well_formed(text)
    assert back.labels["noise"] == "heavy"


@pytest.mark.parametrize(("pixels", "tokens"), [(128, 276), (256, 1060), (512, 4164)])
def test_image_length_as_in_the_paper(pixels, tokens):
    n = pixels // 8
    assert len(vlcot.image_words(torch.zeros(n, n, dtype=torch.long)).split()) == tokens


def spoil(kind):
    t = vlcot.render(chain())
    return {
        "tag missing": t.replace("<middle_understand>", ""),
        "order": t.replace("rough_understand", "X")
        .replace("middle_understand", "rough_understand")
        .replace("X", "middle_understand"),
        "twice": t + " " + t,
        "cut short": t[: len(t) // 2],
        "words between": t.replace("</degradation>", "</degradation> hello"),
        "words before": "so " + t,
        "one code short": t.replace(" <c", " ", 1)
        if False
        else t[: t.rindex("<c")] + t[t.rindex("<row>") :],
        "row end missing": t.replace(" <row>", "", 1),
        "empty part": t.replace("a bird on grass", ""),
        "empty": "",
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "tag missing",
        "order",
        "twice",
        "cut short",
        "words between",
        "words before",
        "one code short",
        "row end missing",
        "empty part",
        "empty",
    ],
)
def test_what_is_not_a_chain(kind):
    assert not vlcot.well_formed(spoil(kind))
    vlcot.parse(spoil(kind))  # never raises


def test_a_cut_chain_keeps_its_whole_parts():
    half = vlcot.parse(spoil("cut short"))
    assert (
        half.degradation
        and half.rough_image is not None
        and half.final_image is None
        and not half.complete
    )


@given(st.text(alphabet="<>/abc ", max_size=80))
@settings(max_examples=80)
def test_nonsense_never_raises(text):
    assert not vlcot.well_formed(text) and not vlcot.parse(text).complete


def test_vocabulary_round_trip_and_unknown_words(words):
    text = vlcot.render(chain())
    assert words.decode(words.encode(text.replace("bird", "seabird"))) == " ".join(
        text.replace("bird", "seabird").split()
    )
    with pytest.raises(ValueError, match="zeppelin"):
        words.encode("a zeppelin")
    codes = torch.randint(0, 64, (2, 4, 4))
    assert words.decode(words.image_ids(codes)[1]) == vlcot.image_words(codes[1])
    assert words.tokenizer("<c5> a <row>")["input_ids"] == words.encode("<c5> a <row>")


def walk(grammar, seed, batch=8):
    """Random words that the grammar allows."""
    g, state, out = torch.Generator().manual_seed(seed), grammar.start(batch), []
    for _ in range(grammar.max_length):
        word = torch.multinomial(grammar.allowed(state).float(), 1, generator=g)[:, 0]
        out.append(word)
        state = grammar.step(state, word)
    return torch.stack(out, 1)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_grammar_allows_is_a_chain(words, seed):
    rows = walk(vlcot.LayoutGrammar(words), seed)
    texts = [words.decode(r) for r in rows]
    assert all(vlcot.well_formed(t) for t in texts)
    assert len({len(t.split()) for t in texts}) > 1  # text parts end where they like


def test_the_grammar_allows_every_true_chain(words):
    grammar = vlcot.LayoutGrammar(words)
    state = grammar.start(1)
    for word in [
        *words.encode(vlcot.render(chain()).replace("bird", "seabird")),
        words.ids[vlcot.EOS],
    ]:
        assert grammar.allowed(state)[0, word], words.words[word]
        state = grammar.step(state, torch.tensor([word]))
    assert int(state) == grammar.final


def test_forced_words_are_layout_only(words):
    grammar = vlcot.LayoutGrammar(words)
    ids = walk(grammar, 0, 2)
    forced = grammar.forced_mask(ids)
    chosen = {words.words[int(w)] for w in ids[~forced]}
    assert all(w.startswith("<c") or w in words.text or w.startswith("</") for w in chosen)
    names = [words.words[int(w)] for w in ids[forced]]
    assert names.count(vlcot.ROW) == 2 * (4 + 8 + 16) and vlcot.START in names


def test_direct_layout_is_the_final_image_alone(words):
    text = words.decode(walk(vlcot.LayoutGrammar(words, tags=("final_image",)), 0, 1)[0])
    assert vlcot.parse(text).final_image.shape == (16, 16) and "rough" not in text

"""The second form's networks together: grammar, policy, sampling, fine-tuning, whole photos.

Random weights are enough: everything here is about form, not about quality."""

import copy
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments

from realsr_r1 import images, sampling, sft, vlcot
from realsr_r1.common import generator
from realsr_r1.decoding import Decoder, wave
from realsr_r1.evaluation.chains import chain_metrics
from realsr_r1.pipeline import CODE, TILE, RealSR, decode_grid, origins, pad, put, reads_clean
from realsr_r1.policy import CELLS, PARENTS, ChainPolicy, PolicyConfig
from realsr_r1.pretraining.redraw import final_codes, redraw
from realsr_r1.sampling import Sampling, choose, keep_top_k, logprobs_of, sample
from realsr_r1.tokenizer import TokenizerConfig, VQModel
from realsr_r1.vlcot import EOS, PAD, Chain

LABELS = "medium blur, downsample, no noise, no compression, keep"


def config(**changes) -> PolicyConfig:
    return PolicyConfig(
        codes=64, hidden_size=32, layers=2, heads=2, mlp=48, eye_width=16, **changes
    )


@pytest.fixture(scope="module")
def model() -> RealSR:
    torch.manual_seed(0)
    shape = TokenizerConfig(
        codes=64, encoder=(16, 16), decoder=(16, 16, 16, 16), lr_width=16, blocks=1
    )
    return RealSR(VQModel(shape), ChainPolicy(config(eye_blocks=1)))


@pytest.fixture(scope="module")
def lr() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def true_chain(seed: int = 0) -> Chain:
    g = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randint(0, 64, (n, n), generator=g) for n in vlcot.GRIDS)
    texts = "a tulip on grass", "a red tulip on grass", "a near view of a red tulip at the top"
    return Chain(LABELS, texts[0], a, texts[1], b, texts[2], c)


def true_ids(policy: ChainPolicy, n: int = 2) -> torch.Tensor:
    v = policy.vocabulary
    rows = [[*v.encode(vlcot.render(true_chain(i))), v.ids[EOS]] for i in range(n)]
    return torch.tensor(rows)


def with_prompt(policy: ChainPolicy, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.tensor(policy.vocabulary.prompt).expand(len(ids), -1), ids], 1)


def test_a_chain_survives_its_text():
    chain = true_chain()
    back = vlcot.parse(vlcot.render(chain))
    for tag in vlcot.TAGS:
        a, b = getattr(chain, tag), getattr(back, tag)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert vlcot.well_formed(vlcot.render(chain))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.replace("</image>", "", 1),
        lambda t: t.replace("<c", "<d", 1),
        lambda t: t.replace("<rough_image>", "<middle_image>"),
        lambda t: t + " more",
        lambda t: t + " " + t,
        lambda t: t[: len(t) // 2],
        lambda t: "",
    ],
)
def test_spoilt_chains_are_not_well_formed_and_never_raise(spoil):
    text = spoil(vlcot.render(true_chain()))
    assert not vlcot.well_formed(text)
    vlcot.parse(text)


def test_a_chain_without_a_part_is_not_rendered():
    with pytest.raises(ValueError, match="the chain lacks its degradation"):
        vlcot.render(Chain())


def test_grammar_and_policy_agree_on_cells(model):
    ids = true_ids(model.policy)
    grammar = model.policy.grammar()
    cells = model.policy.cells(with_prompt(model.policy, ids))
    states = grammar.states(ids)
    prompt = len(model.policy.vocabulary.prompt)
    assert torch.equal(grammar.cell[states], cells[:, prompt - 1 : -1])
    assert sorted(set(cells[cells >= 0].tolist())) == list(range(CELLS))


def test_grammar_allows_true_chains_and_forces_layout_only(model):
    grammar, ids = model.policy.grammar(), true_ids(model.policy)
    states = grammar.states(ids)
    allowed = grammar.allowed(states).gather(-1, ids[..., None])[..., 0]
    assert allowed.all()
    choices = grammar.allowed(states).sum(-1)
    assert torch.equal(choices == 1, grammar.forced[states])
    assert int((~grammar.forced[states][0]).sum()) > 300  # every code and word is a choice


def test_parents_are_the_place_in_the_image_before():
    first = torch.arange(16).view(4, 4)
    middle = PARENTS[16:80].view(8, 8)
    assert (PARENTS[:16] == -1).all()
    assert torch.equal(middle, first.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_aligned_inputs_make_a_cell_see_its_place(model, lr):
    """Changing an LR pixel changes most the logits of the cells at its place."""
    policy, ids = model.policy, with_prompt(model.policy, true_ids(model.policy, 1))
    other = lr[:1].clone()
    other[..., 24:28, 24:28] = 1 - other[..., 24:28, 24:28]
    with torch.no_grad():
        a, b = policy.embed(ids, lr[:1]), policy.embed(ids, other)
    cells = policy.cells(ids)[0]
    change = (a - b).abs().sum(-1)[0]
    final = change[cells >= 80].view(16, 16)
    assert final[12:14, 12:14].mean() > 5 * final[:6, :6].mean()


def test_without_alignment_only_the_prompt_sees_the_photo(lr):
    policy = ChainPolicy(config(aligned=False, eye_blocks=1)).eval()
    ids = with_prompt(policy, true_ids(policy, 1))
    with torch.no_grad():
        change = (policy.embed(ids, lr[:1]) - policy.embed(ids, 1 - lr[:1])).abs().sum(-1)[0]
    assert (change[:64] > 0).all() and (change[64:] == 0).all()


def test_a_cell_sees_the_image_before(model, lr):
    policy = model.policy
    ids = with_prompt(policy, true_ids(policy, 1))
    cells = policy.cells(ids)[0]
    other = ids.clone()
    place = int((cells == 5).nonzero()) + 1  # the token that fills cell 5 of the rough image
    other[0, place] = policy.vocabulary.first_code + (int(ids[0, place]) + 1) % 64
    with torch.no_grad():
        change = (policy.embed(ids, lr[:1]) - policy.embed(other, lr[:1])).abs().sum(-1)[0] > 0
    seen = set(cells[change].tolist()) - {-1}
    children = set((PARENTS == 5).nonzero().flatten().tolist())
    assert children <= seen and seen - children <= {6}  # 6 comes after the changed token


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_decoder_is_the_body_unrolled(kv_heads):
    torch.manual_seed(0)
    body = ChainPolicy(config(kv_heads=kv_heads)).eval().model
    x = torch.randn(4, 12, 32, generator=torch.Generator().manual_seed(0))
    x[1], x[3] = torch.cat([x[0, :5], x[1, 5:]]), torch.cat([x[2, :5], x[3, 5:]])
    with torch.no_grad():
        want = body(inputs_embeds=x).last_hidden_state
    decoder = Decoder(body, x[[0, 2], :5], 8, copies=2)
    places = torch.arange(7).expand(4, -1)
    got = [decoder.last, decoder.step(x[:, 5:8], places[:, :3])]
    got += [decoder.step(x[:, i : i + 1], places[:, i - 5 : i - 4]) for i in range(8, 12)]
    torch.testing.assert_close(torch.cat(got, 1), want[:, 4:], atol=1e-5, rtol=1e-4)


def test_decoder_does_not_see_what_is_not_written(model):
    """As if places that are written later were masked in transformers' forward pass, wherever in
    the cache they lie."""
    body = model.policy.model
    x = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(8, 8).tril().masked_fill(torch.tensor([0, 0, 0, 0, 1, 1, 0, 0]).bool(), 0)
    bias = torch.zeros(1, 1, 8, 8).masked_fill(mask == 0, float("-inf"))
    with torch.no_grad():
        want = body(inputs_embeds=x, attention_mask=bias).last_hidden_state
        whole = body(inputs_embeds=x).last_hidden_state
    for order in ([0, 1, 2, 3], [2, 3, 0, 1]):
        decoder = Decoder(body, x[:, :3], 5)
        decoder.arrange(torch.tensor([[1, 2, 3, 4]]), order)
        decoder.step(x[:, 3:4], torch.tensor([[0]]))
        got = decoder.step(x[:, 6:8], torch.tensor([[3, 4]]))
        torch.testing.assert_close(got, want[:, 6:], atol=1e-5, rtol=1e-4)
        got = decoder.step(x[:, 4:6], torch.tensor([[1, 2]]))  # does not see what comes after it
        torch.testing.assert_close(got, whole[:, 4:6], atol=1e-5, rtol=1e-4)
        again = decoder.step(x[:, 7:], torch.tensor([[4]]))  # place 6 had not seen places 4 and 5
        assert decoder.slot[0, 3:].tolist() == [3, *(4 + order.index(i) for i in range(4))]
        assert not torch.allclose(again, want[:, 7:], atol=1e-5)


def test_waves_draw_every_cell_once_after_what_it_follows():
    for n, lag in ((4, 1), (8, 3), (16, 4), (16, 16)):
        done, steps = {-1}, wave(n, lag)
        for drawn, source, ended in steps:
            assert done >= {*source, *ended} and not done & {*drawn}
            above = [c - n + min(lag, n - c % n) - 1 for c in drawn if c >= n]
            assert done >= {*above}  # in earlier steps: the row above, up to `lag` cells from here
            done |= {*drawn}
        assert len(done) == n * n + 1 and len(steps) == n + (n - 1) * lag
    assert [d for d, _, _ in wave(16, 16)] == [[i] for i in range(256)]


def test_rows_that_wait_for_the_row_above_are_plain_sampling(model, lr):
    """With a lag of a whole row, under texts of unequal length, sampling is one cell after the
    other: the same noise gives the same chain."""
    lr = lr.repeat_interleave(6, 0)
    how = [Sampling(temperature=2.0, greedy_text=False, lag=n) for n in (0, 16)]
    a, b = (model.sample(lr, h, [generator(i) for i in range(len(lr))]) for h in how)
    assert len({int((row != 0).sum()) for row in a.ids}) > 1 and torch.equal(a.ids, b.ids)
    keep = a.ids != 0
    torch.testing.assert_close(a.logprobs[keep], b.logprobs[keep], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("lag", [1, 2])
def test_a_wave_does_not_depend_on_the_batch(model, lr, lag):
    """Under texts of unequal length, so that each chain's image lies elsewhere in the cache. In
    double precision, so that rounding does not decide a draw."""
    model = RealSR(model.tokenizer, copy.deepcopy(model.policy).double())
    how = Sampling(temperature=2.0, greedy_text=False, lag=lag, num_generations=2)
    lr = lr.repeat_interleave(3, 0)
    whole = model.sample(lr, how, [generator(i) for i in range(len(lr))])
    assert len({int((row != 0).sum()) for row in whole.ids}) > 2
    for i in range(len(lr)):
        one, two = model.sample(lr[i : i + 1], how, [generator(i)]), slice(2 * i, 2 * i + 2)
        n = one.ids.shape[1]
        assert torch.equal(one.ids, whole.ids[two, :n])
        torch.testing.assert_close(one.logprobs, whole.logprobs[two, :n], atol=2e-5, rtol=1e-4)
        assert vlcot.well_formed(model.policy.vocabulary.decode(whole.ids[2 * i]))


@pytest.mark.parametrize("aligned", [True, False])
def test_sampling_is_the_policy(lr, aligned):
    """The log-probabilities of sampling are those of one forward pass under the grammar: a group's
    first ratio is 1."""
    torch.manual_seed(0)
    policy = ChainPolicy(config(aligned=aligned, eye_blocks=1)).eval()
    g = torch.Generator().manual_seed(0)
    s = sample(policy, lr, Sampling.rollout(num_generations=2), g)
    with torch.no_grad():
        again = logprobs_of(policy, lr.repeat_interleave(2, 0), s.ids, policy.grammar())
    keep = s.ids != policy.vocabulary.ids[PAD]
    torch.testing.assert_close(s.logprobs[keep], again[keep], atol=2e-5, rtol=1e-4)
    assert all(vlcot.well_formed(policy.vocabulary.decode(row)) for row in s.ids)
    for chain, codes in zip(s.chains, s.codes, strict=True):
        assert torch.equal(chain.final_image, codes)


def test_sampling_is_replayable_and_batches_do_not_matter_for_greedy(model, lr):
    one = model.sample(lr, Sampling(), torch.Generator().manual_seed(4))
    two = model.sample(lr, Sampling(), torch.Generator().manual_seed(4))
    other = model.sample(lr, Sampling(), torch.Generator().manual_seed(5))
    assert torch.equal(one.ids, two.ids) and not torch.equal(one.codes, other.codes)


def test_given_texts_are_written(model, lr):
    texts = {"rough_understand": "a tulip on grass", "final_understand": "a near view of a rose"}
    chains = model.sample(lr, Sampling(), torch.Generator().manual_seed(0), texts).chains
    for chain in chains:
        assert chain.complete
        assert {k: getattr(chain, k) for k in texts} == texts


def test_the_trainer_of_transformers_takes_the_policy_as_it_is(model, lr, tmp_path):
    """(TRL's SFTTrainer does not: its fused loss wants a body that reads ids alone.)"""
    policy = copy.deepcopy(model.policy)
    ids = with_prompt(policy, true_ids(policy))
    labels = ids.clone()
    labels[:, : len(policy.vocabulary.prompt)] = -100
    rows = [{"input_ids": ids[i], "labels": labels[i], "pixel_values": lr[i]} for i in (0, 1) * 3]
    args = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Trainer(policy, args, train_dataset=rows)
    trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    expected = sft.token_losses(model.policy, ids, lr)[0].mean().item()
    assert float(losses[0]) == pytest.approx(expected, rel=0.05)
    assert float(losses[2]) < float(losses[0])


def test_guidance_of_one_is_off_and_others_change_images(model, lr):
    def draw(w):
        return model.sample(lr, Sampling(guidance=w), torch.Generator().manual_seed(0)).codes

    assert torch.equal(draw(1.0), draw(1.0)) and not torch.equal(draw(1.0), draw(3.0))


def test_images_have_the_same_noise_under_short_and_long_texts(model, lr, monkeypatch):
    drawn = []
    monkeypatch.setattr(sampling, "choose", lambda logits, u: drawn.append(u) or choose(logits, u))
    for text in ("a tulip", "a tulip in a field on a white background"):
        given = dict.fromkeys(vlcot.TEXT_TAGS, text) | {"degradation": LABELS}
        model.sample(lr[:1], Sampling(), [generator(3)], given)
    numbers = [x for u in drawn for x in u.tolist() if x]
    assert len(numbers) == 2 * 336 and numbers[:336] == numbers[336:]


def test_top_k_and_choice():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    assert keep_top_k(logits, torch.tensor([2])).isfinite().tolist() == [[False, True, True, False]]
    p = logits.softmax(-1).cumsum(-1)[0]
    us = [0.0, float(p[0]) + 1e-4, float(p[2]) - 1e-4, 0.9999]
    drawn = [int(choose(logits, torch.tensor([u]))) for u in us]
    assert drawn == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="image_temperature must be"):
        Sampling(image_temperature=0)


def test_direct_layout_sees_the_final_grid(model, lr):
    grammar = model.policy.grammar(tags=("final_image",))
    s = sample(model.policy, lr, Sampling(), torch.Generator().manual_seed(0), grammar)
    assert s.chains[0].final_image.shape == (16, 16) and s.chains[0].rough_understand is None


# ---------------------------------------------------------------- fine-tuning


def item(seed: int = 0) -> dict:
    chain = true_chain(seed)
    captions = chain.rough_understand, chain.middle_understand, chain.final_understand
    g = torch.Generator().manual_seed(seed)
    hr = torch.randint(0, 256, (3, 128, 128), generator=g, dtype=torch.uint8)
    lr = torch.randint(0, 256, (3, 32, 32), generator=g, dtype=torch.uint8)
    return {"hr": hr, "lr": lr, "degradation": LABELS, "captions": captions, "index": seed}


def test_filled_chains_hold_the_tokenizers_codes(model):
    batch = sft.collate(model.policy.vocabulary)([item(0), item(1)])
    steps = model.tokenizer.encode_steps(batch["hr"].float() / 255)
    ids = sft.fill(model.policy, batch["ids"], steps)
    prompt = len(model.policy.vocabulary.prompt)
    for i, row in enumerate(ids):
        chain = vlcot.parse(model.policy.vocabulary.decode(row[prompt:]))
        assert chain.complete and chain.degradation == LABELS
        for tag, codes in zip(vlcot.IMAGE_TAGS, steps, strict=True):
            assert torch.equal(getattr(chain, tag), codes[i])


def test_chain_loss_is_the_weighted_mean(model, lr):
    policy, ids = model.policy, with_prompt(model.policy, true_ids(model.policy))
    weights = sft.token_weights(policy.vocabulary, 5.0)
    with torch.no_grad():
        loss = sft.chain_loss(policy, ids, lr, weights)
        logp = policy(ids, lr).logits[:, 64:-1].log_softmax(-1)
    target = ids[:, 65:]
    each = -logp.gather(-1, target[..., None])[..., 0]
    want = (each * weights[target]).sum() / weights[target].sum()
    torch.testing.assert_close(loss, want)
    assert weights[policy.vocabulary.ids["tulip"]] == 5 and weights[policy.vocabulary.ids[PAD]] == 0


def test_a_few_steps_learn_a_chain(lr):
    torch.manual_seed(0)
    policy = ChainPolicy(config(eye_blocks=1))
    ids, weights = with_prompt(policy, true_ids(policy)), sft.token_weights(policy.vocabulary)
    step = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = sft.chain_loss(policy, ids, lr, weights)
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    metrics = chain_metrics(policy.eval(), ids, lr)
    assert set(metrics) == set(vlcot.TAGS) and all(v.shape == (2,) for v in metrics.values())


# ---------------------------------------------------------------- tokenizer


def test_one_decoder_three_uses(model, lr):
    codes = torch.randint(0, 64, (2, 16, 16), generator=torch.Generator().manual_seed(2))
    plain, both, alone = model.decode(codes), model.decode(codes, lr), model.decode(lr=lr)
    assert plain.shape == both.shape == alone.shape == (2, 3, 128, 128)
    assert not torch.equal(plain, both) and not torch.equal(both, alone)
    with pytest.raises(ValueError, match="codes, an LR photo, or both"):
        model.decode()
    with pytest.raises(ValueError, match="does not divide by 8"):
        model.tokenizer.encode(torch.rand(1, 3, 20, 16))


def test_codes_count_for_trust_alone(model, lr):
    tokenizer = model.tokenizer
    codes = torch.randint(0, 64, (2, 16, 16), generator=torch.Generator().manual_seed(2))
    alone = tokenizer.decode(lr=lr)
    gaps = [(tokenizer.decode(codes, lr, t) - alone).abs().mean().item() for t in (0, 0.6, 1)]
    assert gaps[0] < 1e-6 < gaps[1] and gaps[1] != gaps[2]
    torch.testing.assert_close(tokenizer.decode(codes, lr), tokenizer.decode(codes, lr, 0.5))
    with pytest.raises(ValueError, match="trust must be a number from 0"):
        TokenizerConfig(trust=1.5)
    with pytest.raises(ValueError, match="trust_clean must be a number from 0"):
        TokenizerConfig(trust_clean=-0.1)


def test_masked_inputs_are_the_absent_ones(model, lr):
    """In training a batch mixes the three uses; each sample gets what it would get alone."""
    decoder, q = model.tokenizer.decoder, torch.randn(2, 8, 16, 16)
    mixed = decoder(q, lr, torch.tensor([True, False]), torch.tensor([False, True]))
    torch.testing.assert_close(mixed[:1], decoder(q[:1]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[1:], decoder(None, lr[1:]), atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- whole photos


@pytest.mark.parametrize("size", [(32, 32), (33, 50), (20, 61), (90, 57)])
def test_tiles_cover_every_code(size):
    lr = pad(torch.rand(3, *size))
    h, w = lr.shape[-2:]
    assert h >= max(TILE, size[0]) and h % CODE == 0 and w % CODE == 0
    grid = torch.full((h // CODE, w // CODE), -1)
    places = origins(lr.shape[-2:])
    for i, (x, y) in enumerate(places):
        assert x % CODE == y % CODE == 0 and x + TILE <= w and y + TILE <= h
        put(grid, torch.full((16, 16), i), (x, y))
    assert (grid >= 0).all() and (grid[:16, :16] == 0).all()  # the first tile that covers a code
    assert len(places) == math.ceil(h / TILE) * math.ceil(w / TILE)  # no more than it takes


def test_windows_decode_as_the_whole(model, monkeypatch):
    """A large photo is decoded in windows; no seam may show where they meet."""
    lr = torch.rand(3, 96, 80, generator=torch.Generator().manual_seed(0))
    grid = torch.randint(0, 64, (48, 40), generator=torch.Generator().manual_seed(1))
    whole = decode_grid(model, grid, lr, 0.35)
    torch.testing.assert_close(whole, model.decode(grid[None], lr[None], 0.35)[0])
    monkeypatch.setattr("realsr_r1.pipeline.WINDOW", 16)
    torch.testing.assert_close(decode_grid(model, grid, lr, 0.35), whole, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("words", "clean"),
    [
        ("no blur, downsample, light noise, no compression, downsample", True),
        ("medium blur, downsample, no noise, no compression, downsample", False),
        ("no blur, downsample, no noise, heavy compression, downsample", False),
        ("no blur, downsample", False),  # not named is not clean
        (None, False),
    ],
)
def test_where_a_photo_reads_as_clean_codes_count_for_less(model, lr, words, clean):
    codes = torch.randint(0, 64, (16, 16), generator=torch.Generator().manual_seed(2))
    chain = Chain(degradation=words, final_image=codes)
    assert reads_clean(chain) == clean
    made = model.finish([chain], lr[:1])
    trust = model.tokenizer.config.trust_clean if clean else model.tokenizer.config.trust
    torch.testing.assert_close(made, model.decode(codes[None], lr[:1], trust))
    assert not torch.equal(made, model.decode(codes[None], lr[:1], 0.5 if clean else 0.35))


def test_a_whole_photo_is_decoded_with_the_trust_of_its_tiles(model, monkeypatch):
    seen = []
    monkeypatch.setattr("realsr_r1.pipeline.reads_clean", lambda chain: len(seen) < 2)

    def grid(model, codes, lr, trust):
        seen.append(trust)
        return decode_grid(model, codes, lr, trust)

    monkeypatch.setattr("realsr_r1.pipeline.decode_grid", grid)
    photo = Image.effect_noise((40, 32), 60).convert("RGB")
    settings = [model(photo, progress=False).settings for _ in range(3)]
    assert seen == pytest.approx([0.35, 0.35, 0.5]) and settings[2]["trust"] == seen[2]


def test_missing_codes_are_decoded_from_the_photo_alone(model):
    lr = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    out = decode_grid(model, torch.full((16, 16), -1), lr)
    torch.testing.assert_close(out, model.decode(lr=lr[None])[0])


def test_a_whole_photo(model, tmp_path):
    photo = Image.effect_noise((50, 41), 60).convert("RGB")
    a, b = model(photo, seed=1, progress=False), model(photo, seed=1, progress=False)
    assert a.image.size == (200, 164) and a.complete and a.reading.complete
    assert a.image.tobytes() == b.image.tobytes()
    assert a.image.tobytes() != model(photo, seed=2, progress=False).image.tobytes()
    for tile in a.tiles:  # read once: every tile draws under the same texts
        assert tile.chain.final_understand == a.reading.final_understand
    a.save(tmp_path / "out.png", trace=tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    assert trace["complete"] and len(trace["tiles"]) == len(a.tiles)
    assert trace["settings"]["seed"] == 1 and len(trace["tiles"][0]["final_image"]) == 16
    assert Image.open(tmp_path / "out.png").size == (200, 164)
    how = Sampling(image_temperature=np.float32(0.5), lag=np.int64(1))
    model(photo, sampling=how, progress=False).save(tmp_path / "b.png", tmp_path / "b.json")
    trace = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert trace["settings"]["image_temperature"] == 0.5 and trace["settings"]["lag"] == 1
    with pytest.raises(ValueError, match="seed must be"):
        model(photo, seed=None)


def test_a_photo_of_one_tile_is_read_and_drawn_by_one_chain(model, monkeypatch):
    drawn, real = [], RealSR.sample

    def count(self, lr, *args, **options):
        drawn.append(len(lr))
        return real(self, lr, *args, **options)

    monkeypatch.setattr(RealSR, "sample", count)
    out = model(Image.effect_noise((32, 29), 60).convert("RGB"), progress=False)
    assert drawn == [1] and out.tiles[0].chain is out.reading and out.image.size == (128, 116)
    clean = torch.tensor(float(reads_clean(out.reading)))
    assert out.settings["trust"] == float(model.tokenizer.trust(clean))


def test_a_tile_knows_what_lies_around_it(model, monkeypatch):
    """Tiles get what the eye sees of the whole photo: at their borders it knows the neighbors."""
    real, seen = RealSR.sample, []

    def note(self, x, *args, **options):
        seen.append(x)
        return real(self, x, *args, **options)

    monkeypatch.setattr(RealSR, "sample", note)
    photo = Image.effect_noise((64, 32), 60).convert("RGB")
    model(photo, progress=False)
    tiles = torch.stack(images.to_tensor(photo).split(32, 2))
    with torch.no_grad():
        alone = model.policy.eye(tiles)
    same = torch.isclose(seen[1], alone, atol=1e-5).all(1).all(1)  # (tiles, columns)
    assert same[0, :12].all() and same[1, 4:].all() and not same[0, 15] and not same[1, 0]
    half = RealSR(model.tokenizer, copy.deepcopy(model.policy).bfloat16())
    assert half(photo, progress=False).complete


@pytest.mark.parametrize("guidance", [1.0, 0.8])
def test_chains_of_photos_and_of_the_eye_s_maps_are_the_same(model, lr, guidance):
    how = Sampling(guidance=guidance)
    with torch.no_grad():
        maps = model.policy.eye(lr)
    a, b = (model.sample(x, how, generator(0)) for x in (lr, maps))
    assert torch.equal(a.ids, b.ids)


def test_stopping_keeps_what_is_done(model, monkeypatch, capsys):
    photo = Image.effect_noise((80, 32), 60).convert("RGB")
    real, calls = RealSR.sample, []

    def stop(self, *args, **options):
        calls.append(1)
        if len(calls) == 3:  # the reading, one batch, then Ctrl-C
            raise KeyboardInterrupt
        return real(self, *args, **options)

    monkeypatch.setattr(RealSR, "sample", stop)
    monkeypatch.setattr("realsr_r1.pipeline.reads_clean", lambda chain: True)
    out = model(photo, batch=1, progress=False)
    assert not out.complete and len(out.tiles) == 1
    assert "stopped after 1 of" in capsys.readouterr().out
    assert out.settings["trust"] == pytest.approx(0.35)  # that of the tile that is there


@pytest.mark.slow
def test_memory_running_out_halves_the_batch(model, monkeypatch):
    photo = Image.effect_noise((100, 32), 60).convert("RGB")
    real, sizes = RealSR.sample, []

    def tight(self, lr, *args, **options):
        sizes.append(len(lr))
        if len(lr) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, lr, *args, **options)

    monkeypatch.setattr(RealSR, "sample", tight)
    out = model(photo, batch=4, progress=False)
    assert out.complete and sizes == [1, 4, 2, 1, 1, 1, 1]  # the reading first


@pytest.mark.parametrize(
    ("photo", "options", "message"),
    [
        ("no/such.jpg", {}, "does not exist"),
        (Image.new("RGB", (64, 64)), {"max_pixels": 100}, "scale it down"),
        (Image.new("RGB", (64, 64)), {"batch": 0}, "batch must be an integer of at least 1"),
    ],
)
def test_bad_photos_get_one_sentence(model, photo, options, message):
    with pytest.raises(ValueError, match=message):
        model(photo, progress=False, **options)


def test_a_tile_has_one_chain_whatever_the_sampling_says(model):
    photo = Image.effect_noise((40, 32), 60).convert("RGB")
    one, two = (
        model(photo, sampling=Sampling(num_generations=n), progress=False).trace for n in (1, 2)
    )
    assert one == two and len(one["tiles"]) == 2


def test_the_policy_refuses_a_photo_that_is_no_tile(model):
    with pytest.raises(ValueError, match=r"reads 32x32 pixels, got \(1, 3, 16, 32\)"):
        model.sample(torch.rand(1, 3, 16, 32))


def test_save_says_where_it_cannot_write(model, tmp_path):
    out = model(Image.new("RGB", (32, 32)), progress=False)
    with pytest.raises(ValueError, match=r"cannot be written \(No such file"):
        out.save(tmp_path / "no" / "out.png")
    with pytest.raises(ValueError, match=r"end the name in \.png"):
        out.save(tmp_path / "out.xyz")
    with pytest.raises(ValueError, match="give two names"):
        out.save(tmp_path / "out.png", trace=tmp_path / "out.png")


def test_weights_go_to_a_folder_and_back(model, tmp_path, lr):
    before = copy.deepcopy(model.policy.state_dict())
    model.save_pretrained(tmp_path)
    assert all(before[k].equal(v) for k, v in model.policy.state_dict().items())
    back = RealSR.from_pretrained(tmp_path, device="cpu")

    for part in ("policy", "tokenizer"):
        kept, given = (getattr(m, part).state_dict() for m in (back, model))
        torch.testing.assert_close(kept, given, atol=1e-3, rtol=0)
    weights = (tmp_path / "policy-sft" / "model.safetensors").stat().st_size
    assert weights < 2.2 * sum(p.numel() for p in model.policy.parameters())  # half precision
    (tmp_path / "policy-sft" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cut short, damaged"):
        RealSR.from_pretrained(tmp_path, device="cpu")
    with pytest.raises(FileNotFoundError, match="weights policy-grpo are missing"):
        RealSR.from_pretrained(tmp_path, device="cpu", policy="policy-grpo")


def test_the_policy_after_grpo_is_used_where_there_is_one(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "policy-grpo").mkdir()  # a run under way: no weights yet
    RealSR.from_pretrained(tmp_path, device="cpu")
    later = RealSR(model.tokenizer, copy.deepcopy(model.policy))
    with torch.no_grad():
        next(later.policy.parameters()).add_(1)
    later.save_pretrained(tmp_path, "policy-grpo")

    first = [
        next(RealSR.from_pretrained(tmp_path, "cpu", policy).policy.parameters())
        for policy in (None, "policy-grpo", "policy-sft")
    ]
    assert first[0].equal(first[1]) and not first[0].equal(first[2])


def test_a_second_ending_travels_with_the_weights_or_in_its_own_file(model, tmp_path, lr):
    model.save_pretrained(tmp_path / "one")
    two = RealSR.from_pretrained(tmp_path / "one", device="cpu")
    codes = torch.randint(64, (len(lr), 16, 16))
    plain, both = model.decode(codes), model.decode(codes, lr)
    assert two.tokenizer.decoder.clean is None
    ending = two.tokenizer.decoder.clean = two.tokenizer.decoder.new_ending()
    with torch.no_grad():
        ending.later[2][1].bias += 0.5
    brighter = two.decode(codes, lr)
    assert (brighter - both).mean() > 0.1
    torch.testing.assert_close(two.decode(codes), plain, atol=1e-3, rtol=1e-3)  # codes alone
    first = two.tokenizer.decode(codes, lr, clean=False)
    torch.testing.assert_close(first, both, atol=1e-3, rtol=1e-3)
    two.save_pretrained(tmp_path / "two")
    state = {f"decoder.clean.{k}": v.half().contiguous() for k, v in ending.state_dict().items()}
    save_file(state, tmp_path / "one" / "tokenizer" / "clean.safetensors")
    for folder in ("one", "two"):
        back = RealSR.from_pretrained(tmp_path / folder, device="cpu")
        torch.testing.assert_close(back.decode(codes, lr), brighter, atol=1e-3, rtol=1e-3)


def test_parts_of_different_trainings_are_refused(model):
    other = VQModel(TokenizerConfig(codes=32, encoder=(16, 16), decoder=(16, 16, 16, 16)))
    with pytest.raises(ValueError, match="do not belong together"):
        RealSR(other, model.policy)


def test_redrawn_codes_replace_image_cells_only(model, lr):
    ids = with_prompt(model.policy, true_ids(model.policy))
    torch.manual_seed(0)
    new = redraw(model.policy, ids, lr)
    cells = torch.zeros_like(ids, dtype=torch.bool)
    cells[:, 1:] = model.policy.cells(ids)[:, :-1] >= 0
    assert torch.equal(new[~cells], ids[~cells])
    assert (new[cells] != ids[cells]).float().mean() > 0.9  # random weights hardly hit the truth
    assert torch.equal(redraw(model.policy, ids, lr, share=0.0), ids)
    assert torch.equal(final_codes(model.policy, ids)[0], true_chain(0).final_image)
    one = redraw(model.policy, ids, lr, share=torch.tensor([[1.0], [0.0]]))
    assert torch.equal(one[1], ids[1]) and not torch.equal(one[0], ids[0])


@pytest.mark.slow
def test_threads_and_batches_do_not_change_the_picture(model):
    """The same codes; of the pixels, rounding may move one in 255."""
    photo = Image.effect_noise((60, 44), 60).convert("RGB")
    before, made = torch.get_num_threads(), []
    for threads, batch in ((1, 48), (2, 48), (2, 1), (1, 3)):
        torch.set_num_threads(threads)
        made.append(model(photo, seed=5, batch=batch, progress=False))
    torch.set_num_threads(before)
    for other in made[1:]:
        assert other.trace | {"settings": 0} == made[0].trace | {"settings": 0}
        a, b = (images.to_tensor(m.image) * 255 for m in (made[0], other))
        assert (a - b).abs().max() <= 1


PEAK = """
import resource, sys
from realsr_r1.cli import main
assert main(sys.argv[1:]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_many_photos_need_no_more_memory_than_a_few(model, tmp_path):
    model.save_pretrained(tmp_path / "tiny")
    (tmp_path / "out").mkdir()
    photos = [tmp_path / f"{i}.png" for i in range(40)]
    for i, path in enumerate(photos):
        Image.effect_noise((32 + i, 32), 60).convert("RGB").save(path)

    def peak(n: int) -> int:
        """In MB."""
        command = ["restore", *map(str, photos[:n]), "-o", str(tmp_path / "out"), "--model"]
        command = [sys.executable, "-c", PEAK, *command, str(tmp_path / "tiny"), "--device", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])

    few, many = peak(4), peak(40)
    assert many < few + 100, f"{few} MB for 4 photos, {many} MB for 40"

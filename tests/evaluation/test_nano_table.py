import csv
from dataclasses import replace

import pytest
import torch

from realsr_r1 import photographs
from realsr_r1.cli import main
from realsr_r1.evaluation import chains, nano
from realsr_r1.evaluation.nano import lattice
from realsr_r1.pipeline import RealSR


@pytest.fixture(scope="module")
def model() -> RealSR:
    return RealSR.from_pretrained("nano", "cpu")


def noise() -> torch.Tensor:
    return torch.rand(24, 3, 128, 128, generator=torch.Generator().manual_seed(0))


METHODS = (
    "bicubic",
    "LR alone",
    "LR alone, first ending",
    "chain",
    "chain, first ending",
    "chain, codes in full",
    "chain, plain decode",
    "its middle image",
    "its rough image",
    "random codes",
    "true codes",
    "true codes, first ending",
    "true codes, plain decode",
)


def test_a_woven_pattern_is_found_and_noise_has_none():
    """A faint sign at every eighth pixel stands out; the same strength off the grid does not."""
    woven, other = noise(), noise()
    woven[..., ::8, ::8] += 0.3
    other[..., ::7, ::7] += 0.3
    assert abs(lattice(noise())) < 0.7
    assert lattice(woven) > lattice(noise()) + 1
    assert lattice(other) < lattice(woven) - 1


def test_the_table_has_a_row_for_each_photograph_and_method(model, tmp_path):
    photos = photographs.load("test")[:2]
    rows = nano.measure(model, photos, ("light",))
    assert [r["method"] for r in rows[:: len(photos)]] == list(METHODS)
    blank = [r["lpips"] for r in rows if r["method"] == "true codes"]
    assert max(blank) < min(r["lpips"] for r in rows if r["method"] == "its rough image")
    last = {r["method"]: r["consistency"] for r in rows}  # high only for pictures of the same photo
    assert last["bicubic"] > last["its rough image"] + 3
    nano.write(rows, tmp_path / "heat-0.5", "a note")  # a dot is no suffix
    with (tmp_path / "heat-0.5.csv").open(newline="", encoding="utf-8-sig") as f:
        written = list(csv.DictReader(f))
    assert [r["file"] for r in written] == [r["file"] for r in rows]
    assert float(written[0]["lpips"]) == pytest.approx(rows[0]["lpips"], rel=1e-3)
    text = (tmp_path / "heat-0.5.md").read_text(encoding="utf-8")
    assert "chain minus …, dB" in text and "consistency" in text and "| subject |" in text


def test_other_methods_draw_with_the_command_s_seed_and_temperature(tmp_path, monkeypatch):
    """And a place that cannot be written is told before the work."""
    asked = []

    def method(name, model, seed, sampling):
        asked.append((name, seed, sampling.image_temperature))
        raise ValueError("enough")

    monkeypatch.setattr("realsr_r1.evaluation.blind.method", method)
    command = "eval table --peers chain --seed 7 --temperature 1 --device cpu -o".split()
    assert main([*command, str(tmp_path / "a")]) == 2 and asked == [("chain", 7, 1.0)]
    (tmp_path / "b.csv").mkdir()
    assert main([*command, str(tmp_path / "b")]) == 2 and len(asked) == 1


def test_random_codes_are_trusted_as_the_chains_are(model, monkeypatch):
    """Else the chain would be praised for a trust that the control does not have."""
    lr, hr = nano.stacked(nano.held_out(photographs.load("test")[:2], "medium"))
    chains = model.sample(lr, generator=torch.Generator().manual_seed(0)).chains
    chains[0].degradation = "no blur, keep, no noise, no compression, downsample"
    chains[1].degradation = "heavy blur, keep, no noise, no compression, downsample"
    drawn = torch.stack([c.final_image for c in chains])
    monkeypatch.setattr(torch, "randint", lambda *args, **options: drawn)
    made = nano.pictures(model, lr, hr, chains)
    torch.testing.assert_close(made["random codes"], made["chain"])


def test_form_is_certain_for_a_policy_that_cannot_leave_it(model, monkeypatch):
    """The product of the masses that the grammar leaves: one where it leaves all."""
    lr = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    share = chains.well_formed(model, lr)
    assert ((share > 0.5) & (share <= 1)).all()
    grammar = model.policy.grammar()
    monkeypatch.setattr(
        type(grammar),
        "allowed",
        lambda self, s: torch.ones(*s.shape, len(self.masks[0]), dtype=torch.bool),
    )
    assert torch.allclose(chains.well_formed(model, lr), torch.ones(2))


@pytest.mark.parametrize(
    "how",
    [
        chains.Sampling(temperature=0.5, greedy_text=False, entropy_top_k=False),
        chains.Sampling(entropy_top_k=False),
        chains.Sampling(),
    ],
    ids=["colder", "greedy", "as restored"],
)
def test_form_is_the_product_of_what_sampling_leaves(model, how):
    """Counted one token at a time, from the policy's own logits."""
    lr = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = model.sample(lr, replace(how, lag=0), torch.Generator().manual_seed(0)).ids
    policy, grammar = model.policy, model.policy.grammar()
    prompt = torch.tensor(policy.vocabulary.prompt).expand(2, -1)
    with torch.no_grad():
        logits = policy(torch.cat([prompt, ids], 1), lr).logits[:, prompt.shape[1] - 1 : -1]
    want = []
    for row, states in zip(logits, grammar.states(ids), strict=True):
        share = 1.0
        for scores, state in zip(row, states, strict=True):
            allowed, inside = grammar.allowed(state), grammar.cell[state] >= 0
            p = (scores / (how.image_temperature if inside else how.temperature)).softmax(-1)
            if inside and how.entropy_top_k:
                h = -(p * p.log()).sum()
                k = round(1 + 1999 * float(torch.sigmoid(h - 5)))
                p = p.where(p >= p.topk(min(k, len(p))).values[-1], 0.0)
            elif not inside and how.greedy_text:
                p = torch.eye(len(p))[scores.argmax()]
            if state < grammar.max_length:
                share *= float(p[allowed].sum() / p.sum())
        want.append(share)
    assert chains.well_formed(model, lr, how).tolist() == pytest.approx(want, rel=1e-3, abs=1e-9)


def test_given_texts_are_written_and_change_the_picture(model):
    lr = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = [{"rough_understand": t} for t in ("a tulip on grass", "a ferry by the sea")]
    one, two = (chains.under_texts(model, lr, [t], chains.Sampling(), 0) for t in texts)
    assert (one - two).abs().mean() > 0.005

"""What is drawn with guesses ahead is what plain sampling draws."""

from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chi2
from transformers import Qwen3Config, Qwen3ForCausalLM

from realsr_r1 import photographs
from realsr_r1.pipeline import RealSR
from realsr_r1.reference import jacobi
from realsr_r1.reference.jacobi import ChainReading, Reading
from realsr_r1.sampling import Sampling, entropy_top_k, sample
from realsr_r1.vlcot import START

BARE = Sampling.rollout()
VOCAB = 80


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def small(layers=2) -> Qwen3ForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    heads["tie_word_embeddings"] = True
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCAB, **shape, **heads)).eval()


@pytest.fixture(scope="module")
def sharp():
    """A tiny model whose tokens depend strongly on what came before (a fresh one draws almost
    uniformly)."""
    torch.manual_seed(3)
    model = small()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    return model


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(0, VOCAB, (1, 12), generator=gen())


def words(n, places):
    """A grammar of `places` places, each with the same n tokens and nothing else."""
    masks = torch.zeros(1, VOCAB, dtype=torch.bool)
    masks[0, :n] = True
    return torch.zeros(places, dtype=torch.long), masks


def drawn(model, prompt, kinds, how=BARE, window=16, generator=None):
    return jacobi.speculative([Reading(model, prompt)], *kinds, how, window, generator or gen())


# As good as greedy: at temperature 0.0001 a guess stands exactly if it is the likeliest.
LIKELIEST = Sampling(image_temperature=1e-4, entropy_top_k=False, lag=0)


@pytest.fixture(scope="module")
def chain():
    """The shipped policy, an LR photo, a completion of it up to its final image, and the image."""
    policy = RealSR.from_pretrained("nano", "cpu").policy
    item = photographs.Pairs(photographs.load("val"), training=False)[0]
    lr = item["lr"][None].float() / 255
    ids = sample(policy, lr, LIKELIEST, gen()).ids
    at = int((ids[0] == policy.vocabulary.ids[START]).nonzero()[-1]) + 1
    return policy, lr, ids[:, :at], ids[0, at : at + 256]


@pytest.mark.parametrize("window", [4, 16])
def test_the_shipped_policy_draws_the_image_that_it_draws_without_guesses(chain, window):
    policy, lr, before, plain = chain
    grammar = policy.grammar()
    at = before.shape[1]
    states = grammar.states(torch.cat([before, plain[None]], 1))[0, at:]
    kinds = grammar.kind[states], grammar.masks
    found = jacobi.speculative([ChainReading(policy, lr, before)], *kinds, LIKELIEST, window, gen())
    assert found.passes < 256 and float((found.ids == plain).float().mean()) > 0.99


def test_the_chains_reading_sees_what_the_policy_sees(chain):
    """Logits of guesses, some of them taken back, are those of the whole forward pass."""
    policy, lr, before, _ = chain
    reading = ChainReading(policy, lr, before)
    first = policy.vocabulary.first_code
    guesses = torch.tensor([3, 99, 1000]) + first
    with torch.no_grad():
        reading.logits(guesses)
        reading.settle(2, torch.tensor([7 + first]))
        got = reading.logits(torch.tensor([5]) + first)
        prompt = torch.tensor(policy.vocabulary.prompt)[None]
        tail = torch.tensor([[3, 7, 5]]) + first
        want = policy(torch.cat([prompt, before, tail], 1), lr).logits[0, -2:]
    assert torch.allclose(got, want, atol=1e-3)


def exact(model, prompt, n, places):
    """Probability of every sequence of `places` tokens out of n, by enumeration: (n^places,)."""
    sequences = torch.cartesian_prod(*[torch.arange(n)] * places)
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(len(sequences), -1), sequences], 1)).logits
    logits = logits[:, prompt.shape[1] - 1 : -1, :n]
    return logits.log_softmax(-1).gather(-1, sequences[..., None])[..., 0].sum(1).exp()


@pytest.mark.parametrize("window", [2, 8])
def test_what_is_drawn_has_the_distribution_of_plain_sampling(sharp, prompt, window):
    """Chi-square of 800 draws of three codes out of three against the enumerated
    27 probabilities."""
    n, places, draws = 3, 3, 800
    probability, counts, generator = (
        exact(sharp, prompt, n, places),
        torch.zeros(n**places),
        gen(window),
    )
    assert (
        abs(probability.sum() - 1) < 1e-4 and probability.max() > 3 / n**places
    )  # far from uniform: a wrong rule would show
    passes = 0
    for _ in range(draws):
        found = drawn(sharp, prompt, words(n, places), BARE, window, generator)
        a, b, c = found.ids.tolist()
        counts[a * n * n + b * n + c] += 1
        passes += found.passes
    assert passes < draws * places  # something was saved, so guesses were indeed kept
    expected = probability * draws
    rare = expected < 5  # pooled, as the test wants
    pooled = lambda x: torch.cat([x[~rare], x[rare].sum()[None]])  # noqa: E731
    statistic = (
        (pooled(counts) - pooled(expected)).square() / pooled(expected).clamp_min(1e-9)
    ).sum()
    assert statistic < chi2.ppf(0.9995, int((~rare).sum()))


def test_the_acceptance_rule_gives_p_whatever_q():
    """Drawn from q, kept or drawn anew from (p − q)+: p, by enumeration over words and the middle
    of each interval of u."""
    p, q = torch.tensor([0.5, 0.2, 0.3, 0.0]), torch.tensor([0.1, 0.6, 0.2, 0.1])
    out, steps = torch.zeros(4), 2000
    left = (p - q).clamp_min(0)
    for x in range(4):
        us = (torch.arange(steps) + 0.5) / steps
        kept = sum(jacobi._verify(torch.tensor([x]), q[None], p[None], u[None]) for u in us) / steps
        out[x] += q[x] * kept
        out += q[x] * (1 - kept) * left / left.sum()
    assert torch.allclose(out, p, atol=1e-3)


def test_verification_stops_at_the_first_refusal():
    q = torch.full((3, 2), 0.5)
    p = torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.5, 0.5]])
    assert jacobi._verify(torch.tensor([0, 0, 0]), q, p, torch.zeros(3)) == 1
    assert jacobi._verify(torch.tensor([0, 1, 0]), q, p, torch.full((3,), 0.99)) == 3
    assert jacobi._verify(torch.tensor([], dtype=torch.long), q[:0], p[:0], torch.zeros(0)) == 0


def test_forced_tokens_come_out_right(sharp, prompt):
    masks = torch.zeros(2, VOCAB, dtype=torch.bool)
    masks[0, :64] = masks[1, 70] = True
    kinds = torch.tensor(([0] * 4 + [1]) * 6)
    for how in (BARE, Sampling(), Sampling(image_temperature=0.7)):
        ids = drawn(sharp, prompt, (kinds, masks), how).ids
        assert masks[kinds, ids].all()


def test_a_model_that_ignores_its_context_needs_few_passes(prompt):
    """Every second guess is already drawn from the right distribution, so a window of 8 settles 9
    words a pass after the first."""
    model = small(layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        table = model.model.embed_tokens.weight
        table.copy_(table[:1].expand_as(table))
    assert drawn(model, prompt, words(64, 90), BARE, 8).passes == 10


def test_same_generator_same_tokens(sharp, prompt):
    a, b, c = (drawn(sharp, prompt, words(64, 40), BARE, 8, gen(s)).ids for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_guidance_reads_the_image_alone(sharp, prompt):
    """At guidance 0 the prompt is not heard at all."""
    cold = {"image_temperature": 0.01, "entropy_top_k": False}
    alone, kinds = prompt[:, -3:], words(64, 20)
    readings = [Reading(sharp, prompt), Reading(sharp, alone)]
    guided = jacobi.speculative(readings, *kinds, Sampling(guidance=0.0, **cold), 4, gen())
    assert torch.equal(guided.ids, drawn(sharp, alone, kinds, Sampling(**cold), 4).ids)


def test_target_by_hand():
    logits, blind = torch.tensor([[2.0, 1.0, 0.0, 9.0]]), torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    allowed = torch.tensor([[True, True, True, False]])
    how = Sampling(image_temperature=0.5, guidance=0.5, entropy_top_k=False)
    mixed = torch.tensor([1.0, 1.0, 0.0])  # 0 + 0.5·2, 1 + 0.5·0, 0
    scores = jacobi.target(logits, allowed, how, blind)
    assert torch.equal(scores[0, :3], mixed / 0.5) and torch.isinf(scores[0, 3])


def test_entropy_before_or_after_the_temperature():
    """PURE measures the entropy before: k differs, the temperature does not."""
    logits = torch.linspace(0, 4, 3000)[None]
    allowed = torch.ones_like(logits, dtype=torch.bool)
    how = Sampling(image_temperature=0.3)
    first, after = (jacobi.target(logits, allowed, how, k_first=k) for k in (True, False))
    assert (
        torch.isfinite(first).sum()
        == entropy_top_k(logits)
        > entropy_top_k(logits / 0.3)
        == torch.isfinite(after).sum()
    )
    assert torch.allclose(first.max() - first[0, -2], after.max() - after[0, -2], atol=1e-5)


def test_bad_input(sharp, prompt):
    with pytest.raises(ValueError, match="one sequence and a window of at least 1"):
        drawn(sharp, prompt.repeat(2, 1), words(64, 4))
    with pytest.raises(ValueError, match="got 1 and 0"):
        drawn(sharp, prompt, words(64, 4), window=0)


def test_each_pass_reads_only_what_is_new(sharp, prompt):
    """The context is read once; later passes read one settled token and the window, and the cache
    never holds a refused guess."""
    lengths, real = [], sharp.model.forward

    def forward(ids, **options):
        lengths.append(ids.shape[1])
        return real(ids, **options)

    body = SimpleNamespace(model=forward, lm_head=sharp.lm_head, device=sharp.device)
    found = drawn(body, prompt, words(64, 30), BARE, 4)
    assert lengths[0] == prompt.shape[1] + 4 and max(lengths[1:]) == 5
    assert len(lengths) == found.passes
    assert torch.equal(found.ids, drawn(sharp, prompt, words(64, 30), BARE, 4).ids)

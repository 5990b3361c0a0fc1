from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chi2

from realsr_r1.first import policy, vlcot
from realsr_r1.first.policy import Sampling
from realsr_r1.reference import jacobi

BARE = Sampling.rollout()


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def sharp():
    """A tiny policy whose words depend strongly on what came before (a fresh one draws almost
    uniformly)."""
    model = policy.build(
        policy.PolicyConfig(hidden=32, layers=2, heads=2, mlp=64, codes=64, lr_codes=32), seed=3
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    return model


@pytest.fixture(scope="module")
def prompt(sharp):
    return sharp.vocabulary.prompts(torch.randint(0, 32, (1, 4, 4), generator=gen()), vlcot.DIRECT)


def direct(model):
    """Kinds and masks of the direct variant's whole completion: tag, one image of 16×16 codes, tag,
    end."""
    grammar = policy.grammar_of(model, direct=True)
    return grammar.kind[: grammar.max_length], grammar.masks


@pytest.mark.parametrize("window", [1, 3, 16, 400])
def test_greedy_output_is_that_of_plain_decoding(sharp, prompt, window):
    how = Sampling(image_greedy=True)
    drawn = jacobi.speculative(sharp, prompt, *direct(sharp), how, window, gen())
    assert torch.equal(drawn.ids, policy.sample(sharp, prompt, how, gen()).ids[0])
    assert drawn.passes <= len(drawn.ids)


def words(model, n, places):
    """A grammar of `places` places, each with the same n codes and nothing else."""
    masks = torch.zeros(1, len(model.vocabulary), dtype=torch.bool)
    masks[0, model.vocabulary.first_code : model.vocabulary.first_code + n] = True
    return torch.zeros(places, dtype=torch.long), masks


def exact(model, prompt, n, places, how=BARE):
    """Probability of every sequence of `places` codes out of n, by enumeration: (n^places,)."""
    first = model.vocabulary.first_code
    sequences = torch.cartesian_prod(*[torch.arange(n)] * places)
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(len(sequences), -1), sequences + first], 1)).logits
    logits = logits[:, prompt.shape[1] - 1 : -1, first : first + n] / how.temperature
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
        drawn = jacobi.speculative(sharp, prompt, *words(sharp, n, places), BARE, window, generator)
        a, b, c = (drawn.ids - sharp.vocabulary.first_code).tolist()
        counts[a * n * n + b * n + c] += 1
        passes += drawn.passes
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


def test_layout_and_forced_words_come_out_right(sharp, prompt):
    kinds, masks = direct(sharp)
    for how in (BARE, Sampling(), Sampling(entropy_top_k=False, top_k=4, temperature=0.7)):
        ids = jacobi.speculative(sharp, prompt, kinds, masks, how, 16, gen(1)).ids
        assert masks[kinds, ids].all() and vlcot.parse(
            sharp.vocabulary.decode(ids)
        ).final_image.shape == (16, 16)


def test_a_model_that_ignores_its_context_needs_few_passes(prompt):
    """Every second guess is already drawn from the right distribution, so a window of 8 settles 9
    words a pass after the first."""
    model = policy.build(
        policy.PolicyConfig(hidden=32, layers=1, heads=2, mlp=64, codes=64, lr_codes=32)
    ).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(
            model.model.embed_tokens.weight[:1].expand_as(model.model.embed_tokens.weight)
        )
    drawn = jacobi.speculative(model, prompt, *words(model, 64, 90), BARE, 8, gen())
    assert drawn.passes == 10


def test_same_generator_same_words(sharp, prompt):
    a, b, c = (
        jacobi.speculative(sharp, prompt, *words(sharp, 64, 40), BARE, 8, gen(s)).ids
        for s in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_guidance_reads_the_free_context(sharp, prompt):
    """At guidance 0 the prompt is not heard at all: greedy words are those of the free context
    alone."""
    how = Sampling(image_greedy=True, guidance=0.0)
    free, kinds = prompt[:, -3:], words(sharp, 64, 20)
    guided = jacobi.speculative(sharp, prompt, *kinds, how, 4, gen(), free=free)
    alone = jacobi.speculative(sharp, free, *kinds, Sampling(image_greedy=True), 4, gen())
    assert torch.equal(guided.ids, alone.ids)


def test_target_by_hand():
    logits, free = torch.tensor([[2.0, 1.0, 0.0, 9.0]]), torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    allowed = torch.tensor([[True, True, True, False]])
    how = Sampling(temperature=0.5, guidance=0.5, entropy_top_k=False, top_k=2)
    mixed = torch.tensor([1.0, 1.0, 0.0])  # 0 + 0.5·2, 1 + 0.5·0, 0
    assert torch.equal(jacobi.target(logits, allowed, how, free)[0, :2], mixed[:2] / 0.5)
    assert torch.isinf(jacobi.target(logits, allowed, how, free)[0, 2:]).all()
    greedy = jacobi.target(logits, allowed, Sampling(image_greedy=True))
    assert torch.isfinite(greedy).tolist() == [[True, False, False, False]]
    with pytest.raises(ValueError, match="temperature must be above 0"):
        jacobi.target(logits, allowed, Sampling(temperature=0.0))


def test_entropy_before_or_after_the_temperature():
    """PURE measures the entropy before: k differs, the temperature does not."""
    logits = torch.linspace(0, 4, 3000)[None]
    allowed = torch.ones_like(logits, dtype=torch.bool)
    how = Sampling(temperature=0.3)
    first, after = (jacobi.target(logits, allowed, how, k_first=k) for k in (True, False))
    assert (
        torch.isfinite(first).sum()
        == policy.entropy_k(logits)
        > policy.entropy_k(logits / 0.3)
        == torch.isfinite(after).sum()
    )
    assert torch.allclose(first.max() - first[0, -2], after.max() - after[0, -2], atol=1e-5)


def test_bad_input(sharp, prompt):
    kinds, masks = direct(sharp)
    with pytest.raises(ValueError, match="one sequence and a window of at least 1"):
        jacobi.speculative(sharp, prompt.repeat(2, 1), kinds, masks)
    with pytest.raises(ValueError, match="got 1 and 0"):
        jacobi.speculative(sharp, prompt, kinds, masks, window=0)


def test_each_pass_reads_only_what_is_new(sharp, prompt, monkeypatch):
    """The context is read once; later passes read one settled word and the window, and the cache
    never holds a refused guess."""
    lengths, real = [], sharp.model.forward

    def forward(ids, **options):
        lengths.append(ids.shape[1])
        return real(ids, **options)

    body = SimpleNamespace(model=forward, lm_head=sharp.lm_head, device=sharp.device)
    drawn = jacobi.speculative(body, prompt, *words(sharp, 64, 30), BARE, 4, gen())
    assert (
        lengths[0] == prompt.shape[1] + 4 and max(lengths[1:]) == 5 and len(lengths) == drawn.passes
    )
    assert torch.equal(
        drawn.ids, jacobi.speculative(sharp, prompt, *words(sharp, 64, 30), BARE, 4, gen()).ids
    )

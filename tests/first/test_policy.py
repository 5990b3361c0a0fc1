from dataclasses import replace

import pytest
import torch

from realsr_r1.first import policy, vlcot
from realsr_r1.first.policy import Sampling


@pytest.fixture(scope="module")
def prompts(tiny):
    return tiny[2].vocabulary.prompts(
        torch.randint(0, 32, (3, 16, 16), generator=torch.Generator().manual_seed(0))
    )


def test_entropy_top_k_as_published():
    # H = 0 (one certain word), H = 5 nats (uniform over e^5 ≈ 148 words), H ≥ 10 (uniform over
    # 40,000 words)
    certain = torch.full((1, 8), -1e9)
    certain[0, 3] = 0
    assert (
        policy.entropy_k(certain).item() == 1 + int(1999 * torch.sigmoid(torch.tensor(-5.0))) == 14
    )
    assert abs(policy.entropy_k(torch.zeros(1, 148)).item() - 1000) < 3
    assert policy.entropy_k(torch.zeros(1, 40000)).item() == 1987
    masked = torch.zeros(1, 300)
    masked[0, 148:] = float("-inf")
    assert policy.entropy_k(masked) == policy.entropy_k(torch.zeros(1, 148))


def test_keep_top_k_by_hand():
    kept = policy.keep_top_k(torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]]), torch.tensor([1, 2]))
    assert torch.isinf(kept).tolist() == [[True, False, True], [False, True, False]]


def test_sampling_is_reproducible_and_in_form(tiny, prompts):
    model = tiny[2]
    a, b, c = (
        policy.sample(model, prompts, Sampling.rollout(), torch.Generator().manual_seed(s)).ids
        for s in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert all(vlcot.well_formed(model.vocabulary.decode(row)) for row in a)


def test_logprobs_of_sampling_equal_one_forward_pass(tiny, prompts):
    model = tiny[2]
    s = policy.sample(model, prompts, Sampling.rollout(), torch.Generator().manual_seed(1))
    with torch.no_grad():
        again = policy.logprobs_of(model, prompts, s.ids, policy.grammar_of(model))
    real = s.ids != model.vocabulary.ids[vlcot.PAD]
    assert (again - s.logprobs)[real].abs().max() < 1e-3
    forced = policy.grammar_of(model).forced_mask(s.ids) & real
    assert s.logprobs[forced].abs().max() == 0 and s.logprobs[~forced & real].max() < 0


def test_greedy_text_is_the_same_for_all_samples_of_a_prompt(tiny, prompts):
    same = prompts[:1].repeat(4, 1)
    for greedy, distinct in ((True, 1), (False, 4)):
        ids = policy.sample(
            tiny[2],
            same,
            Sampling(greedy_text=greedy),
            torch.Generator().manual_seed(0),
            max_new=20,
        ).ids
        assert len({tuple(r) for r in ids.tolist()}) == distinct


def test_free_sampling_of_an_untrained_model_is_not_a_chain(tiny, prompts):
    ids = policy.sample(
        tiny[2],
        prompts,
        Sampling.rollout(),
        torch.Generator().manual_seed(0),
        use_grammar=False,
        max_new=40,
    ).ids
    assert not any(vlcot.well_formed(tiny[2].vocabulary.decode(r)) for r in ids)


def test_guidance_at_one_is_off_and_elsewhere_changes_images(tiny, prompts):
    runs = {
        g: policy.sample(
            tiny[2],
            prompts,
            Sampling(guidance=g, entropy_top_k=False),
            torch.Generator().manual_seed(0),
        ).ids
        for g in (1.0, 0.8)
    }
    assert runs[1.0].shape == runs[0.8].shape and not torch.equal(runs[1.0], runs[0.8])
    assert all(vlcot.well_formed(tiny[2].vocabulary.decode(r)) for r in runs[0.8])


def test_prefix_fixes_the_first_words(tiny, prompts):
    v = tiny[2].vocabulary
    prefix = torch.tensor([v.encode("<degradation> no blur")]).repeat(3, 1)
    ids = policy.sample(
        tiny[2], prompts, generator=torch.Generator().manual_seed(0), prefix=prefix, max_new=6
    ).ids
    assert torch.equal(ids[:, :3], prefix)


def test_bad_temperature(tiny, prompts):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        policy.sample(tiny[2], prompts, Sampling(temperature=0.0))


def test_code_embeddings_start_like_their_codebooks(tiny):
    vq, reader, _ = tiny
    model = policy.build(
        policy.PolicyConfig(hidden=64, layers=1, heads=2, mlp=64, codes=64, lr_codes=32)
    )
    policy.embed_codebooks(model, vq, reader)
    e = torch.nn.functional.normalize(
        model.get_input_embeddings().weight[model.vocabulary.first_code :][:64], dim=1
    )
    q = torch.nn.functional.normalize(vq.quantize.weight, dim=1)
    pair = torch.corrcoef(torch.stack([(e @ e.T).flatten(), (q @ q.T).flatten()]))
    assert pair[0, 1] > 0.7


def test_save_and_load(tiny, prompts, tmp_path):
    model = tiny[2]
    policy.save(model, tmp_path / "p")
    assert model.dtype == torch.float32
    back = policy.load(tmp_path / "p")
    with torch.no_grad():
        assert torch.allclose(model(prompts).logits, back(prompts).logits, atol=2e-2)
    assert back.nano == model.nano


def test_blend_lies_between_its_two_policies(tiny, tmp_path):
    model = tiny[2]
    policy.save(model, tmp_path / "a")
    other = policy.load(tmp_path / "a")
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    policy.save(other, tmp_path / "b")
    policy.blend(tmp_path / "a", tmp_path / "b", 0.25, tmp_path / "c")
    a, c = (dict(policy.load(tmp_path / n).named_parameters()) for n in "ac")
    assert all(torch.allclose(c[k], a[k] + 0.25, atol=2e-3) for k in a)  # saved in half precision
    with pytest.raises(ValueError, match="between 0"):
        policy.blend(tmp_path / "a", tmp_path / "b", 1.5, tmp_path / "d")
    policy.save(
        policy.build(replace(model.nano, mlp=2 * model.nano.mlp), model.vocabulary), tmp_path / "e"
    )
    with pytest.raises(ValueError, match="different shapes"):
        policy.blend(tmp_path / "a", tmp_path / "e", 0.5, tmp_path / "d")


def test_bad_weights_get_one_sentence(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="are missing in p/"):
        policy.load(tmp_path / "p")
    policy.save(tiny[2], tmp_path / "p")
    file = tmp_path / "p" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-99])
    with pytest.raises(ValueError, match="cut short, damaged"):
        policy.load(tmp_path / "p")
    file.write_bytes(whole)
    nano = tmp_path / "p" / "nano.json"
    nano.write_text(nano.read_text().replace('"codes": 64', '"codes": 48'))
    with pytest.raises(ValueError, match="another vocabulary or shape"):
        policy.load(tmp_path / "p")

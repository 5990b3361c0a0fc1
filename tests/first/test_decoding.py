"""The fast decoder says what transformers' own forward pass says; words are drawn
from the softmax."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from realsr_r1.first import decoding, policy


@pytest.fixture(
    scope="module", params=[(4, 4), (4, 2)], ids=["one key head a head", "grouped key heads"]
)
def model(request):
    heads, kv = request.param
    torch.manual_seed(0)
    made = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            head_dim=8,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    ).eval()
    for p in (
        made.parameters()
    ):  # norms of a new model are all 1, which would hide a norm that is left out
        p.data += 0.2 * torch.randn(p.shape)
    return made


@pytest.mark.parametrize(("copies", "groups"), [(1, 2), (3, 2), (3, 1)])
def test_a_step_at_a_time_equals_one_forward_pass(model, copies, groups):
    g = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 50, (groups, 7), generator=g)
    more = torch.randint(0, 50, (groups * copies, 5), generator=g)
    with torch.no_grad():
        whole = model(torch.cat([prompts.repeat_interleave(copies, 0), more], 1)).logits[:, 6:]
    for decoder in (
        decoding.Decoder(model, prompts, 5, copies),
        policy.PlainDecoder(model, prompts, copies),
    ):
        for i in range(6):
            assert torch.allclose(decoder.logits(), whole[:, i], atol=2e-4), (
                type(decoder).__name__,
                i,
            )
            if i < 5:
                decoder.step(more[:, i])


def test_half_precision_is_near_and_not_the_same(model):
    prompts = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    exact, rounded = (
        decoding.Decoder(model, prompts, 3, 2, bfloat16=half) for half in (False, True)
    )
    for word in (3, 9):
        for decoder in (exact, rounded):
            decoder.step(torch.full((4,), word))
    spread = exact.logits().std()
    assert 0 < (exact.logits() - rounded.logits()).abs().mean() < 0.05 * spread


def test_other_models_go_the_plain_way(model):
    class Own(Qwen3ForCausalLM):
        """A subclass may override anything, so its weights alone do not tell what it computes."""

    own = Own(model.config).eval()
    assert decoding.suits(model) and not decoding.suits(own)
    prompts = torch.randint(0, 50, (1, 4))
    assert isinstance(policy.decoder_of(own, prompts, 2), policy.PlainDecoder)
    assert isinstance(policy.decoder_of(model, prompts, 2), decoding.Decoder)


def test_words_are_drawn_from_the_softmax():
    scores = torch.tensor([[0.0, float("-inf"), 1.0, 2.0]])
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(policy.draw(scores.expand(len(u), -1), u), minlength=4) / len(u)
    assert torch.allclose(share, scores.softmax(-1)[0], atol=0.01) and share[1] == 0
    ends = policy.draw(
        torch.tensor([[float("-inf"), 0.0, float("-inf")]]).expand(2, -1),
        torch.tensor([0.0, 1 - 2**-24]),
    )
    assert ends.tolist() == [1, 1]

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from realsr_r1.first import policy, sft, vlcot


@pytest.fixture(scope="module")
def table(pairs, tiny, words):
    return sft.chains(pairs, tiny[0], tiny[1], words)


def test_a_row_is_prompt_and_chain_and_only_the_chain_is_learnt(table, pairs, tiny, words):
    row = table[3]
    ids, labels = row["input_ids"], row["labels"]
    first = int(np.argmax(labels != -100))
    assert words.words[ids[first - 1]] == vlcot.CHAIN and words.words[ids[first]] == "<degradation>"
    assert (labels[:first] == -100).all() and (
        labels[first:][ids[first:] != 0] == ids[first:][ids[first:] != 0]
    ).all()
    text = words.decode(labels[first:][labels[first:] != -100].tolist())
    chain = vlcot.parse(text)
    assert vlcot.well_formed(text) and chain.labels == pairs.labels[3]
    assert (
        chain.rough_understand,
        chain.middle_understand,
        chain.final_understand,
    ) == pairs.scenes[3].captions
    hr = pairs.hr[3:4].float() / 255
    for image, codes in zip(
        (chain.rough_image, chain.middle_image, chain.final_image),
        sft.encode_steps(tiny[0], hr),
        strict=True,
    ):
        assert torch.equal(image, codes[0])
    assert (
        vlcot.render(
            sft.chain_of(
                pairs.scenes[3], pairs.labels[3], [c[0] for c in sft.encode_steps(tiny[0], hr)]
            )
        )
        == text
    )


def test_direct_rows_hold_the_final_image_alone(pairs, tiny, words):
    row = sft.chains(pairs, tiny[0], tiny[1], words, direct=True)[0]
    text = words.decode(row["labels"][row["labels"] != -100].tolist())
    assert text.startswith("<final_image>") and vlcot.DIRECT in [
        words.words[i] for i in row["input_ids"]
    ]


def test_chains_are_cached_by_content(pairs, tiny, words, tmp_path):
    a = sft.chains(pairs, tiny[0], tiny[1], words, cache=tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 1
    b = sft.chains(pairs, tiny[0], tiny[1], words, cache=tmp_path)
    assert (a[5]["input_ids"] == b[5]["input_ids"]).all() and len(list(tmp_path.glob("*.npz"))) == 1
    sft.chains(replace(pairs, lr=255 - pairs.lr), tiny[0], tiny[1], words, cache=tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 2


def test_weighted_cross_entropy_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]))
    loss = sft.weighted_cross_entropy(
        logits, torch.tensor([0, 1, -100]), torch.tensor([3.0, 1.0, 1.0])
    )
    assert float(loss) == pytest.approx((3 * -math.log(0.5) - math.log(0.8)) / 4, abs=1e-5)


def test_training_moves_every_parameter_logs_and_resumes(table, tiny, tmp_path):
    vq, reader, model = tiny
    out = tmp_path / "p"
    before = policy.build(model.nano)
    policy.embed_codebooks(before, vq, reader)
    options = {"config": model.nano, "batch": 4, "lr": 1e-2, "device": "cpu"}
    sft.train_sft(table, table.select(range(4)), out, vq, reader, max_steps=2, **options)
    after = policy.load(out)
    still = [
        n
        for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True)
        if torch.equal(a.half().float(), b)
    ]
    assert still == []
    log = out.with_suffix(".csv").read_text()
    assert "train_loss" in log
    # The same command after a kill goes on from the checkpoint: with the same number of steps there
    # is nothing left to do.
    assert (tmp_path / "p-checkpoints" / "checkpoint-2").is_dir()
    sft.train_sft(table, None, out, vq, reader, max_steps=2, **options)
    again = policy.load(out)
    assert all(
        torch.allclose(a, b, atol=1e-3)
        for a, b in zip(after.parameters(), again.parameters(), strict=True)
    )


def test_a_few_chains_can_be_learnt_by_heart(table, tiny, tmp_path):
    vq, reader, model = tiny
    config = replace(model.nano, hidden=64)
    few = table.select(range(4))
    losses = []
    for steps in (1, 40):
        out = tmp_path / f"p{steps}"
        sft.train_sft(
            few,
            None,
            out,
            vq,
            reader,
            config=config,
            batch=4,
            lr=1e-2,
            device="cpu",
            max_steps=steps,
        )
        trained = policy.load(out)
        ids, labels = (
            torch.tensor(np.stack([few[i][k] for i in range(4)])).long()
            for k in ("input_ids", "labels")
        )
        with torch.no_grad():
            logits = trained(ids).logits
        losses.append(
            float(
                sft.weighted_cross_entropy(
                    logits[:, :-1].flatten(0, 1),
                    labels[:, 1:].flatten(),
                    torch.ones(len(trained.vocabulary)),
                )
            )
        )
    assert losses[1] < 0.75 * losses[0], losses

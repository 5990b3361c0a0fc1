"""The yardstick of subject and background, on a tiny scale."""

import pytest
import torch

from realsr_r1 import photographs
from realsr_r1.ablations import labels, names


@pytest.fixture(scope="module")
def photos():
    return photographs.load("train")[:6]


@pytest.fixture(scope="module")
def namer(photos):
    return names.train(photos, 96, epochs=80)


def test_it_learns_to_name_what_it_has_seen(namer, photos):
    rows = names.measure(namer, photos)
    assert len(rows) == 18 and all(list(r.labels) == [*names.NAMES] for r in rows)
    right = sum(r.labels["subject"] for r in rows) / len(rows)
    subjects = [p.subject for p in photos]
    guess = max(map(subjects.count, subjects)) / len(photos)  # one name for all of them
    assert right > guess + 0.2


def test_features_are_those_of_the_pairs_in_order(photos):
    data = photographs.Pairs(photos, labels=False)
    x, index = names.seen(data, 70)  # more than one batch
    assert x.shape == (70, 5632) and index.tolist() == [data[i]["index"] for i in range(70)]
    alone = names.features(data[69]["lr"][None].float() / 255)[0]
    torch.testing.assert_close(x[69].float(), alone, atol=2e-2, rtol=2e-3)


def test_the_report_names_who_was_measured(namer, photos):
    text = labels.report(names.measure(namer, photos[:2]), {}, "AlexNet and two layers")
    assert "| label | AlexNet and two layers |" in text and "| subject |" in text

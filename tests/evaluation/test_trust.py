"""The same chains, decoded with more and less trust."""

import torch

from realsr_r1.evaluation import trust
from realsr_r1.photographs import load
from realsr_r1.pipeline import RealSR
from realsr_r1.sampling import Sampling


def test_every_way_has_its_line_and_ways_differ():
    model = RealSR.from_pretrained("nano", "cpu")
    lines = trust.report(model, load("val")[:2]).splitlines()[2:]
    assert [line.split(" | ")[0][2:] for line in lines] == list(trust.WAYS)
    assert len({line.split(" | ", 1)[1] for line in lines[:6]}) == 6
    last = dict(zip(trust.WAYS, (line.split(" | ")[-1] for line in lines), strict=True))
    assert last[trust.SHIPPED].startswith("0.000 [0.000, 0.000]")
    assert last["trust 1.0"] != last["trust 0.5"]


def test_only_photos_read_as_clean_are_decoded_with_the_other_trust():
    model = RealSR.from_pretrained("nano", "cpu")
    lr = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    chains = model.sample(lr, Sampling(), torch.Generator().manual_seed(0)).chains
    chains[0].degradation = "no blur, keep, no noise, no compression, downsample"
    chains[1].degradation = "heavy blur, keep, no noise, no compression, downsample"
    one, other = (trust.decoded(model, chains, lr, 0.7, x, True) for x in (0.7, 0.0))
    torch.testing.assert_close(other[0], model.decode(lr=lr[:1])[0])
    assert not torch.allclose(one[0], other[0], atol=0.01)
    assert torch.equal(one[1], other[1])

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


def test_who_is_held_agrees_more_with_the_photo():
    model = RealSR.from_pretrained("nano", "cpu")
    lr = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    chains = model.sample(lr, Sampling(), torch.Generator().manual_seed(0)).chains
    chains[0].degradation = "no blur, keep, no noise, no compression, downsample"
    chains[1].degradation = "heavy blur, keep, no noise, no compression, downsample"

    def gap(held: str) -> list[float]:
        made = trust.decoded(model, chains, lr, 0.7, held)
        return (torch.nn.functional.avg_pool2d(made, 4) - lr).square().mean((1, 2, 3)).tolist()

    none, clean, everyone = gap("none"), gap("clean"), gap("all")
    assert clean[0] < none[0] and clean[1] == none[1]
    assert everyone[0] == clean[0] and everyone[1] < none[1]

"""The chain against the final image alone, on a tiny scale."""

from realsr_r1 import photographs
from realsr_r1.ablations import chain
from realsr_r1.pipeline import RealSR
from realsr_r1.pretraining.recipes import Machine


def test_variants_of_a_seed_are_trained_and_measured_side_by_side(tmp_path):
    model = RealSR.from_pretrained("nano", "cpu")
    settings = chain.Settings(None, tmp_path, steps=1)
    photos = photographs.load("test")[:2]
    paths = chain.seeds(model, photos, settings, Machine(batch=2), 1)
    text = chain.table(paths)
    for variant in chain.VARIANTS[:4]:
        assert f"| {variant} |" in text
    assert text.count("[") == 3  # a paired difference for each but the first


def test_a_chain_is_longer_than_a_direct_sequence():
    assert 1.2 < chain.length_ratio() < 1.6

import torch

from realsr_r1.evaluation.nano import lattice


def noise() -> torch.Tensor:
    return torch.rand(24, 3, 128, 128, generator=torch.Generator().manual_seed(0))


def test_a_woven_pattern_is_found_and_noise_has_none():
    """A faint sign at every eighth pixel stands out; the same strength off the grid does not."""
    woven, other = noise(), noise()
    woven[..., ::8, ::8] += 0.3
    other[..., ::7, ::7] += 0.3
    assert abs(lattice(noise())) < 0.7
    assert lattice(woven) > lattice(noise()) + 1
    assert lattice(other) < lattice(woven) - 1

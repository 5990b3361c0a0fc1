import numpy as np
import pytest

from realsr_r1.stats import Interval, clustered


def test_an_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(60):
        found = clustered(rng.normal(1.0, 1.0, 40), range(40), resamples=300, seed=i)
        hits += found.low <= 1.0 <= found.high
    assert 50 <= hits <= 60


def test_clusters_that_resemble_each_other_widen_the_interval():
    rng = np.random.default_rng(1)
    authors = np.repeat(np.arange(10), 8)
    values = rng.normal(0, 1, 10)[authors] + 0.05 * rng.normal(0, 1, 80)
    honest, naive = clustered(values, authors), clustered(values, range(80))
    assert honest.mean == pytest.approx(naive.mean) == pytest.approx(values.mean())
    assert honest.high - honest.low > 1.8 * (naive.high - naive.low)


def test_it_is_replayable_and_says_whether_it_is_clear_of_zero():
    values = [0.1, 0.2, 0.3, 0.4]
    assert clustered(values, "abcd") == clustered(values, "abcd")
    assert clustered(values, "abcd").clear_of_zero
    assert not clustered([-1.0, 1.0, -1.0, 1.0], "abcd").clear_of_zero
    assert str(Interval(0.1, 0.05, 0.15)) == "0.100 [0.050, 0.150]"


def test_one_cluster_has_no_interval_and_lengths_must_agree():
    assert np.isnan(clustered([1.0, 2.0], "aa").low)
    with pytest.raises(ValueError, match="2 values and 3 clusters"):
        clustered([1.0, 2.0], "abc")

"""Intervals: known values, and calibration by simulation."""

import math

import numpy as np
import pytest

from statex.errors import UserError
from statex.results.claims import RECALL_MARGIN, claim
from statex.results.statistics import (
    Estimate,
    Needs,
    Sums,
    bootstrap_difference,
    bootstrap_mean,
    combine,
    detectable_ratio,
    needs,
    over_seeds,
    student_quantile,
    unanimous_difference,
    wilson,
)


def ones(values):
    return Sums(np.asarray(values, dtype=float), np.ones(len(values)))


def test_wilson_known_values():
    estimate = wilson(8, 10)  # Agresti and Coull 1998
    assert (estimate.low, estimate.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 20).low == 0
    assert wilson(0, 20).high == pytest.approx(0.1611, abs=1e-4)
    assert wilson(20, 20).high == 1


@pytest.mark.parametrize(("n", "half"), [(500, 0.044), (100, 0.096)])
def test_half_widths_that_the_definitions_give(n, half):
    estimate = wilson(n / 2, n)
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, abs=1.5e-3)


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.706), (2, 4.303), (4, 2.776), (30, 2.042), (1e9, 1.960)])
def test_student_quantile(freedom, value):
    assert student_quantile(freedom) == pytest.approx(value, abs=2e-3)


def test_weighted_mean_counts_weights():
    sums = Sums(np.array([2.0, 30.0]), np.array([1.0, 3.0]))
    assert bootstrap_mean(sums).value == 8.0


def test_all_right_has_wilsons_interval():
    estimate = bootstrap_mean(ones([1.0] * 30), fraction=True)
    assert estimate.low == pytest.approx(wilson(30, 30).low)


def test_one_item_gives_no_interval():
    assert math.isnan(bootstrap_mean(ones([0.5])).low)


def test_pairing_removes_what_the_items_share():
    rng = np.random.default_rng(0)
    base = rng.normal(size=100)
    paired = bootstrap_difference(ones(base + 0.1), ones(base))
    assert paired.low == pytest.approx(0.1)
    assert paired.high == pytest.approx(0.1)


def test_different_items_are_refused():
    with pytest.raises(UserError, match="different items"):
        bootstrap_difference(ones([1.0, 2.0]), ones([1.0]))


def test_items_needed():
    nothing = bootstrap_difference(ones(np.tile([0.0, 1.0, 0.0, 1.0], 25)), ones(np.tile([0.0, 1.0, 1.0, 0.0], 25)))
    assert needs(nothing) is None
    seen = bootstrap_difference(ones(np.tile([1.0, 0.0], 50)), ones(np.tile([1.0, 0.0, 0.0, 1.0], 25) * 0.8))
    ratio = (1.98 + 0.84) * seen.standard_error / seen.value
    assert needs(seen) == Needs(items=pytest.approx(100 * ratio**2, rel=0.01))


@pytest.mark.parametrize(("freedom", "ratio"), [(2, 5.65), (4, 3.76), (20, 2.95), (math.inf, 2.80)])
def test_detectable_difference_in_standard_errors(freedom, ratio):
    assert detectable_ratio(freedom) == pytest.approx(ratio, abs=0.01)


def established(effect, num_items, num_seeds, seed_spread, runs=400):
    """The share of comparisons that establish a true gain; items and their noise have variance 1 and 1/4 an arm."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(runs):
        own = rng.normal(scale=seed_spread, size=(num_seeds, 1)) + rng.normal(scale=0.5, size=(num_seeds, num_items))
        gains = effect + rng.normal(size=num_items) + own
        hits += over_seeds([ones(gain) for gain in gains], [ones(np.zeros(num_items))] * num_seeds).low > 0
    return hits / runs


def difference(effect, num_items, num_seeds, seed_spread):
    """The estimate that such a comparison would make on average."""
    by_seeds, by_items = seed_spread**2 / num_seeds, (1 + 0.25 / num_seeds) / num_items
    error = math.sqrt(by_seeds + by_items)
    return Estimate(effect, effect - 2 * error, effect + 2 * error, num_items, "", error, num_seeds, 9.0, by_seeds)


@pytest.mark.parametrize(("num_seeds", "seed_spread"), [(3, 0.0), (5, 0.02), (3, 0.02)])
def test_as_many_items_as_are_asked_for_establish_the_difference(num_seeds, seed_spread):
    needed = needs(difference(0.15, 50, num_seeds, seed_spread))
    assert needed.seeds is None
    assert needed.items > 50
    assert 0.75 <= established(0.15, needed.items, num_seeds, seed_spread) <= 0.9


def test_as_many_seeds_as_are_asked_for_establish_the_difference():
    needed = needs(difference(0.5, 100, 3, 0.5))
    assert needed.items is None
    assert needed.seeds > 3
    assert 0.75 <= established(0.5, 100, needed.seeds, 0.5) <= 0.93


def test_seeds_and_items_where_neither_alone_would_do():
    needed = needs(difference(0.2, 20, 3, 0.5))
    assert needed.items > 20
    assert needed.seeds > 3
    assert 0.7 <= established(0.2, needed.items, needed.seeds, 0.5, runs=80) <= 0.98


def asked(num_items, effect, seed_spread, runs=60):
    """What comparisons of 3 seeds, the same whatever the number of items, ask for."""
    rng, found = np.random.default_rng(0), []
    for trained in np.random.default_rng(1).normal(scale=seed_spread, size=(runs, 3, 1)):
        own = trained + rng.normal(scale=0.5, size=(3, num_items))
        gains = effect + rng.normal(size=num_items) + own
        found.append(needs(over_seeds([ones(gain) for gain in gains], [ones(np.zeros(num_items))] * 3)))
    return found


def test_what_seeds_cause_is_never_put_down_to_items():
    """The items asked for used to grow with those there were: 939, 3222, 13655, 54196 at these n."""
    medians = []
    for n in (100, 400, 1600, 6400):
        found = asked(n, effect=0.5, seed_spread=1.0)
        assert sum(one.seeds is not None for one in found) >= 0.65 * len(found)
        medians.append(float(np.median([one.seeds or 3 for one in found])))
    assert max(medians) <= 2 * min(medians)
    assert 20 <= np.mean(medians) <= 60  # 34 with the true variance


def test_what_items_cause_asks_for_the_same_number_whatever_n():
    medians = [np.median([one.items or math.inf for one in asked(n, 0.25, 0.0)]) for n in (400, 1600, 6400)]
    assert max(medians) <= 2 * min(medians)


@pytest.mark.parametrize("seed_spread", [0.0, 0.1])
def test_no_gain_is_claimed_of_a_gain_as_large_as_the_margin_in_one_run_of_twenty_at_most(seed_spread):
    rng = np.random.default_rng(1)
    claims = []
    for _ in range(400):
        own = rng.normal(scale=seed_spread, size=(3, 1)) + rng.normal(scale=0.2, size=(3, 200))
        found = over_seeds([ones(RECALL_MARGIN + one) for one in own], [ones(np.zeros(200))] * 3)
        claims.append(claim((found.low, found.high)))
    assert claims.count("no gain") + claims.count("loss") <= 0.05 * len(claims)


@pytest.mark.parametrize(("interval", "claimed"), [
    ((0.01, 0.6), "gain"), ((-0.1, 0.049), "no gain"), ((-0.2, -0.1), "loss"), ((-0.1, 0.051), "undecided"),
    ((-1.0, 0.6), "undecided"), ((0.0, 0.0), "no gain"), (None, "undecided"), ((math.nan, math.nan), "undecided"),
])  # fmt: skip
def test_claims(interval, claimed):
    assert claim(interval) == claimed


def excluded(make, runs):
    """The share of intervals that exclude 0."""
    hits = [not estimate.low <= 0 <= estimate.high for estimate in (make(run) for run in range(runs))]
    return sum(hits) / runs


@pytest.mark.parametrize("n", [12, 60])
def test_paired_difference_of_zero_is_excluded_in_5_percent(n):
    def run(seed):
        rng = np.random.default_rng(seed)
        weights = rng.integers(1, 20, n).astype(float)
        shared = rng.normal(size=n)
        ours, theirs = (Sums((shared + rng.normal(size=n)) * weights, weights) for _ in range(2))
        return bootstrap_difference(ours, theirs, replicates=400, seed=seed)

    assert 0.03 <= excluded(run, 1000) <= 0.075


@pytest.mark.parametrize(("seeds", "seed_spread"), [(3, 0.0), (3, 0.5), (5, 0.1)])
def test_difference_over_seeds_is_calibrated(seeds, seed_spread):
    def run(number):
        rng = np.random.default_rng(number)
        shared = rng.normal(size=50)
        arms = [
            [ones(shared + rng.normal(scale=0.5, size=50) + rng.normal(scale=seed_spread)) for _ in range(seeds)]
            for _ in range(2)
        ]
        return over_seeds(*arms)

    assert 0.01 <= excluded(run, 1000) <= 0.07


@pytest.mark.parametrize(("share", "spread"), [(0.002, 0.0), (0.01, 0.5), (0.05, 0.5)])
@pytest.mark.parametrize("n", [20, 100])
def test_a_small_share_is_covered_also_where_every_seed_scores_0(share, spread, n):
    """Seeds whose log-odds vary by `spread`; in up to 9 of 10 runs no seed scores anything."""
    rng = np.random.default_rng(0)
    odds = math.log(share / (1 - share)) + spread * rng.normal(size=(500, 3))
    chances = 1 / (1 + np.exp(-odds))
    covered = [
        estimate.low <= chances.mean() <= estimate.high
        for run in chances
        for estimate in [over_seeds([ones(rng.random(n) < chance) for chance in run], fraction=True)]
    ]
    assert sum(covered) / len(covered) >= 0.93


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_a_difference_of_0_between_arms_that_hardly_differ_is_excluded_in_5_percent_at_most(share):
    def run(number):
        rng = np.random.default_rng(number)
        arms = [[ones(rng.random(40) < share) for _ in range(3)] for _ in range(2)]
        return over_seeds(*arms, fraction=True)

    assert excluded(run, 500) <= 0.07


def test_agreement_of_all_seeds_leaves_open_what_one_seed_does():
    nothing, all_right = ([ones([value] * 30)] * 3 for value in (0.0, 1.0))
    assert over_seeds(nothing, fraction=True).high == wilson(0, 30).high
    assert over_seeds(all_right, fraction=True).low == wilson(30, 30).low
    assert over_seeds(nothing, fraction=True).seeds == 3
    same = over_seeds(nothing, nothing, fraction=True)
    assert (same.value, same.low, same.high) == (0, -wilson(0, 30).high, wilson(0, 30).high)
    for alone in (nothing[:1], nothing):
        gain = over_seeds(all_right[: len(alone)], alone, fraction=True)
        assert (gain.value, gain.high) == (1, 1)
        assert 0.8 < gain.low < wilson(30, 30).low
    assert over_seeds(nothing).high == 0  # a metric that is not a fraction may have no variance


def test_a_unanimous_difference_is_symmetric_and_shrinks_with_n():
    gain, loss = unanimous_difference(0.25, 40), unanimous_difference(-0.25, 40)
    assert (gain.low, gain.high) == pytest.approx((-loss.high, -loss.low))
    assert gain.low < 0.25 < gain.high
    assert unanimous_difference(0.25, 4000).low > gain.low


@pytest.mark.parametrize("seed_spread", [0.0, 0.5])
def test_seeds_combined_without_their_items_cover_no_less(seed_spread):
    def run(number):
        rng = np.random.default_rng(number)
        shared = rng.normal(size=40)
        runs = [ones(shared + rng.normal(scale=0.5, size=40) + rng.normal(scale=seed_spread)) for _ in range(3)]
        return combine([bootstrap_mean(one, replicates=200) for one in runs])

    assert excluded(run, 400) <= 0.07
    assert combine([bootstrap_mean(ones([1.0, 3.0])), bootstrap_mean(ones([3.0, 5.0]))]).value == 3.0


def test_one_seed_says_that_it_is_over_items_only():
    assert "items only" in over_seeds([ones([0.0, 1.0, 1.0])], [ones([0.0, 0.0, 1.0])]).method

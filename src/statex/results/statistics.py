"""Intervals and power: Wilson, bootstrap over clusters, paired differences, several training seeds.

A metric's value is a weighted mean over items, sum(w v) / sum(w); items of one cluster (a document, a sequence) are
drawn together. Letters: n clusters, S seeds, R bootstrap replicates.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import nctdtrinc, ndtri, stdtrit  # scipy.stats, with the same functions, takes 0.5 s to import

from statex.errors import UserError

NORMAL_QUANTILE = float(ndtri(0.975))
POWER = 0.8
"""Power: the share of runs in which a comparison should establish the difference that it was planned for."""
MOST_ITEMS = 1_000_000
"""Where more items than this would be needed, more seeds are called for."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval.

    Args:
        value: the weighted mean, or the difference of two.
        low, high: the 95 % interval; NaN where there are too few items for one.
        n: the number of independent items (clusters) behind it.
        method: how the interval was made, in a few words.
        standard_error: of `value`, as the same method gives it.
        seeds: the number of training seeds behind it, 1 where only items vary.
        freedom: degrees of freedom of the standard error.
        seed_variance: the part of the squared standard error that stays however many items there are, because the
            training seeds cause it; it shrinks as 1 / seeds.
    """

    value: float
    low: float
    high: float
    n: int
    method: str
    standard_error: float
    seeds: int = 1
    freedom: float = math.inf
    seed_variance: float = 0.0


@dataclass(frozen=True)
class Sums:
    """Weighted sums of one metric by cluster, in a fixed order of clusters.

    Args:
        totals: (n,) sum of w v in each cluster.
        weights: (n,) sum of w in each cluster, not negative.
    """

    totals: np.ndarray
    weights: np.ndarray

    @property
    def mean(self) -> float:
        weight = self.weights.sum()
        return float(self.totals.sum() / weight) if weight > 0 else math.nan

    @property
    def rates(self) -> np.ndarray:
        """(n,) the mean of each cluster, 0 where it has no weight."""
        return self.totals / np.maximum(self.weights, 1e-300)


def wilson(successes: float, n: int, quantile: float = NORMAL_QUANTILE) -> Estimate:
    """The Wilson interval of a share (E. B. Wilson 1927), which also holds where the share is 0 or 1.

    Args:
        successes: how many of the `n` independent items succeeded; a fraction of an item counts as such.
    """
    if n < 1:
        raise UserError("n", n, "an interval needs at least one item", "raise num_items")
    share = min(successes / n, 1.0)  # a sum of rounded fractions may exceed it
    denominator = 1 + quantile**2 / n
    centre = (share + quantile**2 / (2 * n)) / denominator
    half = quantile * math.sqrt(share * (1 - share) / n + quantile**2 / (4 * n * n)) / denominator
    low = 0.0 if share == 0 else max(0.0, centre - half)
    high = 1.0 if share == 1 else min(1.0, centre + half)
    return Estimate(share, low, high, n, "Wilson", math.sqrt(share * (1 - share) / n))


def bootstrap_mean(sums: Sums, *, fraction: bool = False, replicates: int = 2000, seed: int = 0) -> Estimate:
    """Weighted mean with a bootstrap interval over clusters.

    The interval is the expanded percentile interval (T. Hesterberg, The American Statistician 2015), which corrects
    the plain one for being too narrow with few clusters.

    Args:
        fraction: the metric lies between 0 and 1; where all clusters agree, and resampling says nothing, the interval
            is Wilson's with the clusters as items.
    """
    n = len(sums.weights)
    value = sums.mean
    if fraction and _all_agree(sums.rates):
        return wilson(value * n, n)
    draws = _resampled_means(sums, _counts(n, replicates, seed))
    return _estimate(value, draws, n, "bootstrap over items")


def bootstrap_difference(
    ours: Sums, theirs: Sums, *, fraction: bool = False, replicates: int = 2000, seed: int = 0
) -> Estimate:
    """The difference of two weighted means on the same clusters, each replicate drawing the same ones for both.

    Args:
        fraction: both lie between 0 and 1; where they differ alike on all clusters the interval is that of
            `unanimous_difference`.
    """
    n = len(ours.weights)
    if n != len(theirs.weights):
        raise UserError("items", (n, len(theirs.weights)), "two arms have different items", "evaluate both on the same")
    if fraction and _all_agree(ours.rates - theirs.rates):
        return unanimous_difference(ours.mean - theirs.mean, n)
    counts = _counts(n, replicates, seed)
    draws = _resampled_means(ours, counts) - _resampled_means(theirs, counts)
    return _estimate(ours.mean - theirs.mean, draws, n, "paired bootstrap over items")


def unanimous_difference(value: float, n: int) -> Estimate:
    """The difference of two fractions that is the same on all `n` items, with the uncertainty that so few items leave.

    Of the shares of items gained and lost one is 0. Each has Wilson's interval, and R. G. Newcombe's method (Statistics
    in Medicine 1998) combines them into the interval of their difference.
    """
    gained, lost = wilson(max(value, 0.0) * n, n), wilson(max(-value, 0.0) * n, n)
    low = value - math.hypot(gained.value - gained.low, lost.high - lost.value)
    high = value + math.hypot(gained.high - gained.value, lost.value - lost.low)
    error = math.hypot(gained.standard_error, lost.standard_error)
    return Estimate(value, low, high, n, "Newcombe where all items agree", error)


def bootstrap_ratio(numerator: Sums, denominator: Sums, *, replicates: int = 2000, seed: int = 0) -> Estimate:
    """The ratio of two sums over the same clusters, `totals` of each; replicates without a denominator are left out."""
    sign = 1.0 if denominator.totals.sum() >= 0 else -1.0
    ratio = Sums(sign * numerator.totals, sign * denominator.totals)
    n = len(ratio.weights)
    return _estimate(ratio.mean, _resampled_means(ratio, _counts(n, replicates, seed)), n, "bootstrap over items")


def over_seeds(runs: list[Sums], baseline: list[Sums] | None = None, *, fraction: bool = False) -> Estimate:
    """Mean over training seeds, or the mean paired difference, with seeds and items both as sources of variance.

    With S >= 2 seeds, all evaluated on the same n clusters, value = mean over seeds and
    variance = s^2 / S + V_items - V_both, and no less than any of the three, where s^2 is the variance between the
    seeds' own values, V_items the variance over clusters of the value averaged over seeds, and V_both what these two
    count twice (random effects of seeds and items, crossed, by the usual analysis of variance on the linearised
    means). The interval is Student's with Satterthwaite's degrees of freedom: a bootstrap over 3 seeds would be far
    too narrow. More items shrink V_items alone, which has V_both in it; s^2 / S - V_both is what the seeds cause.
    With one seed the interval is over items only, and `method` says so. Where all seeds and items agree no variance
    is visible, and a fraction's interval is that of one seed's n items: seeds that share their items carry no more
    information than those n items.

    Args:
        runs: one `Sums` per seed.
        baseline: the other arm's, in the same order of seeds.
        fraction: the metric lies between 0 and 1.
    """
    if len(runs) == 1:
        alone = (
            bootstrap_mean(runs[0], fraction=fraction)
            if baseline is None
            else bootstrap_difference(runs[0], baseline[0], fraction=fraction)
        )
        return replace(alone, method="one seed: over items only")
    rates = np.stack([run.rates for run in runs])  # S, n
    if baseline is not None:
        rates = rates - np.stack([run.rates for run in baseline])
    if fraction and _all_agree(rates):
        value, n = float(rates.flat[0]), rates.shape[1]
        agreed = wilson(value * n, n) if baseline is None else unanimous_difference(value, n)
        return replace(agreed, seeds=len(runs))
    values = np.array([run.mean for run in runs])
    influence = np.stack([_influence(run) for run in runs])  # S, n
    if baseline is not None:
        values = values - np.array([run.mean for run in baseline])
        influence = influence - np.stack([_influence(run) for run in baseline])
    seeds, n = influence.shape
    between = float(values.var(ddof=1)) / seeds
    items = float(influence.mean(axis=0).var(ddof=1)) / n if n > 1 else 0.0
    residual = influence - influence.mean(axis=0)
    both = float((residual**2).sum()) / ((seeds - 1) * max(n - 1, 1)) / (seeds * n)
    variance = max(between + items - both, between, items, both)
    uncertainty = between**2 / (seeds - 1) + items**2 / max(n - 1, 1)
    freedom = variance**2 / uncertainty if uncertainty > 0 else (seeds - 1) * max(n - 1, 1)
    half = student_quantile(freedom) * math.sqrt(variance)
    value = float(values.mean())
    method = "seeds and items as random effects"
    error, caused_by_seeds = math.sqrt(variance), max(between - both, 0.0)
    return Estimate(value, value - half, value + half, n, method, error, seeds, freedom, caused_by_seeds)


def combine(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over two or more training seeds of values whose items are not available, from their intervals.

    variance = s^2 / S + the mean variance of one seed's value: the items are taken to err alike in every seed, which
    is the most they can, so that the interval covers no less than that of `over_seeds`.
    """
    seeds, n = len(estimates), min(estimate.n for estimate in estimates)
    value = float(np.mean([estimate.value for estimate in estimates]))
    between = float(np.var([estimate.value for estimate in estimates], ddof=1)) / seeds
    items = float(np.mean([estimate.standard_error**2 for estimate in estimates]))
    uncertainty = between**2 / (seeds - 1) + items**2 / max(n - 1, 1)
    half = student_quantile((between + items) ** 2 / uncertainty if uncertainty > 0 else math.inf)
    half *= math.sqrt(between + items)
    method = "seeds and items by the intervals of each seed"
    return Estimate(value, value - half, value + half, n, method, math.sqrt(between + items), seeds)


@dataclass(frozen=True)
class Needs:
    """What would establish a difference of the observed size with 80 % power; None: as many as there are.

    Args:
        items: this many items for each seed.
        seeds: this many training seeds; given only where no number of items suffices with the present seeds.
    """

    items: int | None = None
    seeds: int | None = None


def needs(difference: Estimate) -> Needs | None:
    """The items, or else the seeds, that would establish this difference with 80 % power; None without a difference.

    More items shrink only the part of the variance that items cause. Where the part that seeds cause is too large by
    itself, more seeds are needed, and more items too if no number of seeds would do with the present items. Each part
    counts with its own degrees of freedom (K. S. Banerjee's bound, 1960), so that needing more of either never looks
    like needing less.
    """
    size, n, seeds = difference.value**2, difference.n, difference.seeds
    if size < 1e-24 or not math.isfinite(difference.standard_error):
        return None
    of_seeds = difference.seed_variance * seeds
    of_items = max(difference.standard_error**2 - difference.seed_variance, 0.0) * n * detectable_ratio(n - 1) ** 2

    def by_seeds(count: int) -> float:
        return of_seeds / count * detectable_ratio(count - 1) ** 2

    def seeds_for(allowed: float) -> int:
        fewest = max(seeds, math.ceil(of_seeds / allowed * detectable_ratio(math.inf) ** 2))
        return next(count for count in itertools.count(fewest) if by_seeds(count) <= allowed)

    left = size - by_seeds(seeds)
    if left > 0 and of_items / left <= MOST_ITEMS:
        return Needs(items=max(1, math.ceil(of_items / left)))
    if size > of_items / n:
        return Needs(seeds=seeds_for(size - of_items / n))
    more = seeds_for(size / 2)
    return Needs(math.ceil(of_items / (size - by_seeds(more))), more)


def detectable(difference: Estimate) -> float:
    """The smallest true difference that a comparison with this error would establish with 80 % power."""
    half = max(difference.value - difference.low, difference.high - difference.value)
    return half * detectable_ratio(difference.freedom) / student_quantile(difference.freedom)


def detectable_ratio(freedom: float) -> float:
    """The same in standard errors: the noncentrality at which a 95 % test by Student's distribution has 80 % power."""
    freedom = min(max(freedom, 1.0), 1e9)
    return float(nctdtrinc(freedom, 1 - POWER, student_quantile(freedom)))


def student_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's distribution, for any real number of degrees of freedom from 1."""
    return float(stdtrit(max(freedom, 1.0), 0.975))


def _all_agree(rates: np.ndarray) -> bool:
    """Whether all are equal up to rounding."""
    return rates.size > 0 and float(np.ptp(rates)) < 1e-12


def _counts(n: int, replicates: int, seed: int) -> np.ndarray:
    """(R, n) how often each cluster is drawn in each replicate."""
    if n == 0:
        raise UserError("items", 0, "there is nothing to average", "raise num_items or num_windows")
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=replicates)


def _resampled_means(sums: Sums, counts: np.ndarray) -> np.ndarray:
    """(R,) weighted means of the replicates; NaN where a replicate drew no weight."""
    weights = counts @ sums.weights
    totals = counts @ sums.totals
    return np.divide(totals, weights, out=np.full(len(weights), np.nan), where=weights > 0)


def _estimate(value: float, draws: np.ndarray, n: int, method: str) -> Estimate:
    draws = draws[np.isfinite(draws)]
    if n < 2 or len(draws) == 0 or not math.isfinite(value):
        return Estimate(value, math.nan, math.nan, n, f"{method}: too few for an interval", math.nan)
    quantile = student_quantile(n - 1) * math.sqrt(n / (n - 1))
    tail = 0.5 * math.erfc(quantile / math.sqrt(2))
    low, high = np.quantile(draws, [tail, 1 - tail])
    error = float(draws.std(ddof=1)) * math.sqrt(n / (n - 1))
    return Estimate(value, float(low), float(high), n, method, error, freedom=n - 1)


def _influence(sums: Sums) -> np.ndarray:
    """(n,) each cluster's linear share in the weighted mean, times n; their mean is 0."""
    total = sums.weights.sum()
    if total <= 0:
        raise UserError("items", 0, "there is nothing to average", "raise num_items or num_windows")
    return (sums.totals - sums.weights * sums.mean) * (len(sums.weights) / total)

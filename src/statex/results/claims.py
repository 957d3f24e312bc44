"""What the interval of a paired difference allows one to claim: the same rules for verdict and diagnosis.

The absence of evidence is not a finding: "no gain" is claimed only where the interval's upper end is below a stated
margin, and anything between is undecided.
"""

from typing import Literal

RECALL_MARGIN = 0.05
"""A gain of recall (a difference of accuracies) below this counts as none."""
TEXT_MARGIN = 0.02
"""A rise of text NLL, as a share of the baseline's, up to this counts as kept."""

Claim = Literal["gain", "no gain", "loss", "undecided"]
"""About a difference where more is better. A loss must be established too: the whole interval is below 0."""


def claim(interval: tuple[float, float] | None, margin: float = RECALL_MARGIN) -> Claim:
    """What the 95 % interval of a difference establishes, given a margin above 0; undecided without an interval."""
    if interval is None:
        return "undecided"
    low, high = interval
    if low > 0:
        return "gain"
    if high < 0:
        return "loss"
    return "no gain" if high < margin else "undecided"

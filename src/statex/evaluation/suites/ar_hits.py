"""AR-hits on real text: the tokens that the context itself has shown (Zoology, arXiv 2312.04927).

A token is a hit if its bigram (or longer n-gram) occurred earlier in the context and at most theta times in the
training text, so that only memory of the context can predict it. Hits whose latest occurrence is far back are the
long-gap slice of JRT (arXiv 2407.05483). Without theta most tokens are hits, and the measure is meaningless.
"""

import numpy as np
from pydantic import Field

from statex.evaluation.context import Context
from statex.evaluation.records import Score, digest
from statex.evaluation.suite import Cell, Suite
from statex.evaluation.text.count_table import CountTable, count_table, ngram_keys
from statex.evaluation.text.windows import Window, WindowSettings, held_out_windows, scored_windows, window_cells

LONG_GAP = 1024
"""Tokens since the latest occurrence from which a hit counts as long-gap."""


class ArHitsSettings(WindowSettings):
    theta: int = Field(default=0, ge=0, description="most occurrences of a hit's n-gram in the training text")
    ngram: int | None = Field(
        default=None, ge=2, le=4, description="default: 2, but 3 below 16,384 and 4 below 2,048 tokens of vocabulary"
    )
    count_tokens: int = Field(default=2_000_000, ge=1, description="tokens of the training text that are counted")


def ngram_gaps(keys: np.ndarray) -> np.ndarray:
    """(T,) how many tokens back each n-gram of (T,) occurred last, 0 where it had not."""
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    gaps = np.zeros(len(keys), dtype=np.int64)
    gaps[order[1:][same]] = (order[1:] - order[:-1])[same]
    return gaps


def find_hits(ids: np.ndarray, table: CountTable, theta: int) -> tuple[np.ndarray, np.ndarray]:
    """(T,) which of the tokens after the first of (T + 1,) are hits, and (T,) their gaps, 0 if there is none."""
    keys = ngram_keys(ids, table.ngram, table.vocab_size)
    unseen = len(ids) - 1 - len(keys)  # no n-gram ends at the first tokens
    gaps = np.concatenate([np.zeros(unseen, np.int64), ngram_gaps(keys)])
    rare = np.concatenate([np.zeros(unseen, bool), table.lookup(keys) <= theta])
    return (gaps > 0) & rare, gaps


def windows(context: Context) -> list[Window]:
    return held_out_windows(context, "ar_hits", context.settings("ar_hits"), context.training_length)


def score(context: Context, cell: Cell) -> list[Score]:
    settings = context.settings("ar_hits")
    table = count_table(context, settings.ngram, settings.count_tokens)
    scored = scored_windows(context, windows(context))
    return [_score_window(cell, window, nll, table, settings.theta) for window, nll in scored]


def _score_window(cell: Cell, window: Window, nll: np.ndarray, table: CountTable, theta: int) -> Score:
    hits, gaps = find_hits(window.ids, table, theta)
    parts = {
        "nll": np.ones_like(hits),
        "hit_nll": hits,
        "other_nll": ~hits,
        "long_gap_nll": hits & (gaps >= LONG_GAP),
    }
    parts = {name: part for name, part in parts.items() if part.any()}
    return Score(
        item=f"{cell.name}/{window.name}",
        cluster=window.document,
        slice={},
        scores={name: float(nll[part].mean()) for name, part in parts.items()} | {"hit_share": float(hits.mean())},
        weights={name: float(part.sum()) for name, part in parts.items()} | {"hit_share": float(len(nll))},
        digest=digest(window.ids, table.digest, f"{theta} {table.ngram}"),
        measured={
            "tokens": len(nll),
            "ngram": table.ngram,
            "theta": theta,
            "count_tokens": table.num_tokens,
            "count_table_hash": table.digest,
        },
    )


SUITE = Suite(
    name="ar_hits",
    units={"hit_nll": "nats", "other_nll": "nats", "long_gap_nll": "nats", "hit_share": "fraction", "nll": "nats"},
    groups=((),),
    cells=window_cells,
    score=score,
    settings=ArHitsSettings,
    check=windows,
)

"""The figure of a sweep: every curve in sight and in words, one file without references, and a clear word otherwise."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from statex.errors import UserError
from statex.reporting.sweep import sweep_picture, write_sweep

PEERS = {"gla": "fla 0.6.0", "ssd": "mamba_ssm 2.3"}


def fabricated(sweep, **changes):
    """Records of both recurrences at three points: 1000 ns per token forward, 3000 with the backward, the peer twice
    that, the floor a tenth."""
    records = []
    for op, peer in PEERS.items():
        for index in range(3):
            tokens, size = (1024 << index, 4096) if sweep == "tokens" else (1024, 4096 << index)
            for name, factor in (("fwd", 1), ("fwd+bwd", 3)):
                ms = factor * tokens / 1e3
                record = {"case": f"{op}-{index}", "op": op, "pass": name, "tokens": tokens, "state_size": size}
                record |= {"dtype": "bfloat16", "correct": True, "peer": peer, "sweep": sweep, "device": "NVIDIA <X>"}
                record |= {"commit": "0123456789ab", "ratio": 2.0, "ms": ms, "peer_ms": 2 * ms, "floor_ms": ms / 10}
                records.append(record | {"peak_bytes": 5000 * tokens, "peer_peak_bytes": 9000 * tokens} | changes)
    return records


def words(svg):
    """What each panel says to readers who cannot see it."""
    tag = "{http://purl.org/dc/elements/1.1/}description"
    return next(one.text or "" for one in ElementTree.fromstring(svg).iter(tag)).splitlines()


@pytest.mark.parametrize(("sweep", "axis"), [("state", "4K"), ("tokens", "1K")])
def test_every_curve_is_drawn_and_described(sweep, axis):
    svg = sweep_picture(fabricated(sweep))
    told = words(svg)
    assert len(told) == 6
    for op, peer in PEERS.items():
        forward, both, memory = (text for text in told if text.startswith(f"{op}: "))
        for text, factor in ((forward, 1), (both, 3)):
            for name, value in (("statex", 1000), (peer, 2000), ("floor", 100)):
                assert f"{name}: {factor * value:.3g} at {axis}, " in text
        assert f"statex: 5 at {axis}" in memory
        assert f"{peer}: 9 at {axis}" in memory
        assert "floor" not in memory
    assert "NVIDIA &lt;X&gt;, source 0123456789ab" in svg
    assert len(re.findall(">state elements of a layer<|>tokens<", svg)) == 6


def test_ratios_where_there_are_no_times():
    told = words(sweep_picture(fabricated("state", ms=None, peer_ms=None, floor_ms=None, peak_bytes=None)))
    assert len(told) == 4
    assert all("times as fast as the peer" in text and "statex: 2 at 4K" in text for text in told)


def test_a_peer_that_was_not_measured_has_no_curve():
    told = words(sweep_picture(fabricated("state", peer=None, peer_ms=None, peer_peak_bytes=None)))
    assert len(told) == 6
    assert not any(name in text for text in told for name in PEERS.values())


def test_what_was_wrong_is_named_and_not_drawn():
    records = fabricated("tokens")
    untimed = ("case", "op", "pass", "tokens", "state_size", "dtype", "peer", "sweep", "device", "commit")
    wrong = [{name: record[name] for name in untimed} | {"correct": False} for record in records]
    svg = sweep_picture([*wrong[:2], *records[2:]])
    assert "Wrong results, so not timed: gla-0" in svg
    assert "1K" not in next(text for text in words(svg) if text.startswith("gla"))
    assert words(sweep_picture(wrong)) == []


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", json.dumps([{"case": "gla-1x1024x2048", "sweep": None}])])
def test_something_that_is_not_a_sweep(content, tmp_path):
    path = tmp_path / "ops.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"sweep = '.*ops.json': (cannot be read as JSON|holds no records of a sweep)"):
        write_sweep(path)
    assert not path.with_suffix(".svg").exists()

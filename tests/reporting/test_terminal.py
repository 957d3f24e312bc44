"""What a run says on the terminal when it ends."""

from fabricated import fabricated_run
from rich.console import Console

from statex.reporting.terminal import summary


def test_verdict_then_one_table_then_the_rest_in_plain_text(tmp_path):
    parts = summary(fabricated_run(tmp_path, without=("passkey",)))
    console = Console(width=200, record=True)
    for part in parts:
        console.print(part)
    words = console.export_text()
    assert parts[2].row_count == 10
    assert words.startswith("gla: expanding the state raised recall at 32 pairs")
    remark = "gla: signs of failure: text lost (reinit); see the Diagnosis."
    places = [words.index(one) for one in ("mamba2: expanding", "recall by pairs", "7 of 8", remark)]
    assert places == sorted(places)
    assert "│ ██▇▆ " in words
    assert "✓ +0.27" in words
    assert "7 of 8 aims are met. Not met: recall above lpt, mamba2 reinit." in words
    assert not any(mark in words for mark in ("**", "](#"))

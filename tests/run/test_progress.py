"""What a long job shows: a line for each stage, or bars on a terminal."""

import io

from rich.console import Console

from statex.run.progress import Display


def shown(terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=140)
    with Display(console) as display:
        for step in range(4):
            display.update("gla seed 0", "train [lpt]", step, 3)
        display.update("mamba2 seed 0", "pre-train", 0, 9)
        display.update("gla seed 0", "done", 1, 1)
    return console.file.getvalue()


def test_a_line_for_each_stage():
    lines = shown(terminal=False).splitlines()
    assert lines == ["[gla seed 0] train [lpt]", "[mamba2 seed 0] pre-train", "[gla seed 0] done  (train [lpt]: 0 s)"]


def test_a_bar_for_each_chain():
    text = shown(terminal=True)
    assert "gla seed 0" in text
    assert "mamba2 seed 0" in text
    assert "1/1" in text


def test_by_default_it_leaves_standard_output_alone(capsys):
    with Display() as display:
        display.update("gla seed 0", "train", 0, 3)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "[gla seed 0] train" in captured.err

"""The section that says what failed, and what could have been seen."""

from dataclasses import replace

from fabricated import fabricated_run, rewrite
from markup import section, tree

from statex.reporting.page import write_report


def test_diagnosis_shows_each_failure_with_its_numbers(whole):
    _, html, markdown = whole
    words = section(html, "Diagnosis")
    assert "Text lost, reinit. Text NLL changed by +0.062 against lpt" in words
    assert "Recall flat, reinit. Recall at 32 pairs changed by −0.020" in words
    assert "not used. Zeroing the new entries changes recall by" in words
    assert "−0.210 [−0.240, −0.180]: they are in use, whether or not they raise recall." in words
    assert "reinit: the new entries, 75 % of the state, hold" in words
    assert "zeroing them changes text NLL by +0.050 nats [+0.040, +0.060] (n = 32 documents)" in words
    assert "recall at 32 pairs by −0.210 [−0.240, −0.180] (n = 64 sequences)" in words
    assert "Not moved at all: layer 2: layers.2.q_proj.weight." in words
    assert "Smallest failure this run could detect (80 % power): a rise of text NLL by 0.013 nats (n = 100" in words
    assert "and a change of recall by 0.064 (n = 200 sequences)." in words
    found = next(one for one in tree(html).iter("section") if one.find("h2").text == "Diagnosis")
    labels = [drawing.get("alt") for drawing in found.iter("img")]
    assert "gla: text NLL, nats, minus lpt: base +0.140 [+0.131, +0.149]; reinit +0.062 [+0.053, +0.071]" in labels[1]
    assert any(
        label.startswith("gla: effective rank of the state against layer. reinit: 3.25 to 5.5 at 0") for label in labels
    )
    assert any(
        label.startswith("gla: energy in the new entries against step. reinit: 0.1 at 0, 0.225 at 50, 0.35 at 100")
        for label in labels
    )
    assert any(label.startswith("gla: effective rank of the state against step. reinit: 5 at 0") for label in labels)
    ids = {one.get("id") for one in tree(html).iter()}
    links = [one.get("href") for one in tree(html).iter("a")]
    assert {"#r1-text", "#r1-recall", "#r1-diagnosis"} <= set(links)
    assert all(link.removeprefix("#") in ids for link in links)
    assert "[Recall](#recall)" in markdown
    assert "signs of failure: text lost (reinit)" in section(html, "Verdict")


def test_undecided_differences_are_not_signs_of_failure_and_say_what_would_decide_them(tmp_path):
    """Also where a sign was stored under older rules."""
    fabricated_run(tmp_path, models=("mamba2",), without=("passkey", "cost"))
    power = {"detectable": 2.0, "items": None, "seeds": 21}

    def change(row):
        at = row.slice.get("num_pairs") == 32 and row.arm == "reinit" and row.baseline
        return replace(row, value=0.02, low=-0.3, high=0.34, details={"power": power}) if at else row

    rewrite(tmp_path, change)
    html = write_report(tmp_path)[0].read_text(encoding="utf-8")
    words = section(html, "Diagnosis")
    assert "Undecided, reinit. Recall changed by +0.02 [−0.30, +0.34]: a gain is neither established nor ruled" in words
    assert "To establish a difference of this size: more seeds needed: 21." in words
    assert "a change of recall by more than is possible" in words
    assert "Recall flat" not in words
    assert "? +0.02 [−0.30, +0.34]" in section(html, "Verdict")
    assert "Undecided: recall above lpt, mamba2 reinit." in section(html, "Aims")
    assert "more seeds needed: 21" in section(html, "Aims")


def test_without_failures_the_smallest_detectable_one_is_stated(tmp_path):
    fabricated_run(tmp_path, models=("gla",), without=("passkey", "cost"))
    rewrite(tmp_path, lambda row: None if row.metric == "text_lost" else row)
    words = section(write_report(tmp_path)[0].read_text(encoding="utf-8"), "Diagnosis")
    assert "No sign of failure is established in reinit and preserve." in words
    assert "Smallest failure this run could detect (80 % power): a rise of text NLL by 0.013 nats" in words


def test_a_run_that_was_not_diagnosed_says_how_it_can_be(tmp_path):
    fabricated_run(tmp_path, models=("gla",), without=("diagnostics", "passkey", "cost"))
    html = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert "Not run. Repeat statex run with the same recipe to add it" in section(html, "Diagnosis")
    assert "signs of failure" not in section(html, "Verdict")


def test_needles_that_no_arm_finds_are_one_sentence(tmp_path):
    fabricated_run(tmp_path, models=("gla",), without=("mqar", "ar_hits", "nll_by_position", "diagnostics", "cost"))
    found = ("passkey", "accuracy")
    rewrite(
        tmp_path, lambda row: replace(row, value=0.0, low=0.0, high=0.037) if (row.suite, row.metric) == found else row
    )
    write_report(tmp_path)
    words = section((tmp_path / "report.html").read_text(encoding="utf-8"), "Long contexts")
    assert "gla: no arm finds anything in passkey: accuracy is 0 at every length. With 100 questions" in words
    assert "an accuracy below 0.037 is not excluded." in words
    assert list((tmp_path / "figures").glob("passkey-answer_nll-*"))
    assert not list((tmp_path / "figures").glob("passkey-accuracy-*"))


def test_power_note_where_nothing_is_established(tmp_path):
    fabricated_run(tmp_path, models=("gla",), without=("passkey", "nll_by_position"))
    power = {"detectable": 0.2, "items": 4321, "seeds": None}

    def change(row):
        return replace(row, details={"power": power} | ({"items_needed": 7} if row.arm == "control" else {}))

    rewrite(tmp_path, lambda row: change(row) if row.baseline else row)
    words = section(write_report(tmp_path)[0].read_text(encoding="utf-8"), "Paired differences")
    assert "−0.020 [−0.065, +0.025], more items needed: 4,321" in words
    assert "[+0.225, +0.315], more" not in words
    for needed in ({"items": None, "seeds": 21}, {"items": 900, "seeds": 21}):
        power |= needed
        rewrite(tmp_path, lambda row: change(row) if row.baseline else row)
        words = section(write_report(tmp_path)[0].read_text(encoding="utf-8"), "Paired differences")
        with_items = ", with 900 items" if needed["items"] else " "
        assert f"−0.020 [−0.065, +0.025], more seeds needed: 21{with_items}" in words

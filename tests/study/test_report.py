"""From answers in the file to the page of a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apt.errors import DataError, InputError
from apt.study.criteria import Choice
from apt.study.document import Study
from apt.study.make import MakeConfig
from apt.study.report import ReportConfig, report_study
from apt.study.store import AnswerStore, Shown
from tests.study.folders import small_study


def rate(folder: Path, study: Study, rater: int, *, wrecks: bool = False) -> None:
    """The first model is better to look at, the second one in structure; no difference in text."""
    store = AnswerStore(folder, study)
    for shown in store.begin(rater):
        first, second = sides(shown)
        if shown.task.kind == "check":
            better = second if wrecks else first
            answer = dict.fromkeys(
                ("visual_fidelity", "structural_integrity", "text_alignment"), better
            )
        else:
            answer = {
                "visual_fidelity": first,
                "structural_integrity": second,
                "text_alignment": "same",
            }
        store.answer(rater, shown.position, 1, answer)
    store.close()


def sides(shown: Shown) -> tuple[Choice, Choice]:
    return ("right", "left") if shown.task.flipped else ("left", "right")


def test_a_study_from_answers_to_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    config = MakeConfig(note="Rated by a script", check_every=6, repeat_every=3)
    study = small_study(folder, ("ours", "theirs", "third|one"), config=config)
    for rater in (1, 2, 3):
        rate(folder, study, rater, wrecks=rater == 2)
    page = report_study(
        folder, tmp_path / "out", bases={"ours": "third|one", "theirs": "third|one"}, command="x y"
    )
    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    scores = figures["comparisons"][0]["scores"]
    # The first of each pair, whichever side it was on; rater 2 does not count.
    assert [scores[name]["score"]["value"] for name in scores] == [1, -1, 0, 0]
    assert scores["visual_fidelity"]["good"] == 2 * len(study.pairs) // 3
    assert figures["comparisons"][0]["relative"]["visual_fidelity"]["value"] == 1
    assert figures["kappa"]["visual_fidelity"] is None  # all chose the first: chance agrees as well
    assert [rater["counted"] for rater in figures["raters"]] == [True, False, True]
    first = figures["raters"][0]
    assert first["checks_passed"] == first["checks"] == 3 * len(study.checks)
    assert first["repeats_same"] == first["repeats"] > 0
    assert first["rated"] == len(study.pairs)
    text = page.read_text()
    assert "**Rated by a script**" in text and "third\\|one" in text and "nan" not in text
    assert "**+100.0 %** [+100.0 %, +100.0 %]<br>12/0/0" in text
    assert "no: attention" in text and "```bash\nx y\n```" in text
    rows = [line for line in text.splitlines() if line.startswith("| ours")]
    assert rows and all(row.replace("\\|", "").count("|") in (3, 5, 6) for row in rows)
    everyone = report_study(folder, tmp_path / "all", config=ReportConfig(min_attention=0))
    assert "18/0/0" in everyone.read_text()


def test_undone_and_skipped_answers_do_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    study = small_study(folder, config=MakeConfig(check_every=0, repeat_every=0))
    rate(folder, study, 1)
    store = AnswerStore(folder, study)
    first, second = store.tasks(1)[:2]
    better, worse = sides(first)
    store.answer(
        1,
        0,
        2,
        {"visual_fidelity": worse, "structural_integrity": worse, "text_alignment": better},
    )
    store.answer(1, second.position, 2, None)
    report_study(folder, tmp_path / "out")
    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    visual = figures["comparisons"][0]["scores"]["visual_fidelity"]
    pairs = len(study.pairs)
    assert (visual["good"], visual["bad"]) == (pairs - 2, 1)
    assert figures["raters"][0]["skipped"] == 1 and figures["raters"][0]["rated"] == pairs - 1


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    study = small_study(folder)
    with pytest.raises(DataError, match="no answers yet"):
        report_study(folder, tmp_path / "out")
    AnswerStore(folder, study).begin(1)
    with pytest.raises(DataError, match="nobody has rated a pair"):
        report_study(folder, tmp_path / "out")
    with pytest.raises(InputError, match="no model 'ourz'"):
        report_study(folder, tmp_path / "out", bases={"ourz": "theirs"})
    rate(folder, study, 1, wrecks=True)
    with pytest.raises(DataError, match="or passed the attention checks"):
        report_study(folder, tmp_path / "out")
    with pytest.raises(InputError, match="at least 100"):
        ReportConfig(resamples=3)
    with pytest.raises(InputError, match="min_attention must be from 0 to 1"):
        ReportConfig(min_attention=2)

"""Comparisons, claims and the report of made-up studies, with and without what is optional."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import made_studies as studies
import numpy as np
import pytest

from grace.study import claims as c
from grace.study.answers import as_json, entropy_error, from_json
from grace.study.comparisons import ABOVE, BELOW, ONE_SEED, compare, counterpart, partners
from grace.study.report import findings, footnotes, write_report
from grace.study.resampling import Interval, Resampled
from grace.study.sections import example, sections

SWEEP = {
    "qat-4": {
        "method": "qat",
        "candidates": [{"learning_rate": 1e-4}, {"learning_rate": 1e-3}],
        "totals": [10.0, 20.0],
        "chosen": {"learning_rate": 1e-3},
        "at_edge": True,
    },
    "kd-4": {
        "method": "kd",
        "candidates": [
            {"learning_rate": 1e-3, "beta_init": 4.0},
            {"learning_rate": 1e-4, "beta_init": 4.0},
            {"learning_rate": 1e-4, "beta_init": 1.0},
        ],
        "totals": [11.0, 12.0, 13.0],
        "chosen": {"learning_rate": 1e-4, "beta_init": 1.0},
        "at_edge": False,
    },
}


def make_arms(**shares: float) -> list[dict[str, Any]]:
    """Arms of a whole study; how often each is right may be set by method."""
    random = np.random.default_rng(0)
    usual = {"teacher": 0.95, "student": 0.8, "control": 0.82, "distil": 0.86, "rtn": 0.6}
    usual |= {"gptq": 0.65, "awq": 0.64, "qat": 0.7, "kd": 0.72, "grace": 0.85}
    usual |= {"grace-no-gate": 0.8, "grace-no-rcka": 0.84}
    arms = []
    for method, share in {**usual, **shares}.items():
        trained = method not in ("teacher", "student", "rtn", "gptq", "awq")
        low = method not in ("teacher", "student", "control", "distil")
        right = studies.rights(random, share, seeds=2 if trained else 1, images=200)
        name = f"{method}-4" if low else method
        cka = (0.5, 0.9 if method == "grace" else 0.6)
        arms.append(studies.arm(name, right, bits=4 if low else 32, trained=trained, cka=cka))
    plain = studies.rights(random, 0.61, seeds=2, images=200)
    arms.append(studies.arm("rtn-4-control", plain, bits=4, start="control"))
    return arms


def at_bits(arms: list[dict[str, Any]], *more: int) -> list[dict[str, Any]]:
    """The arms, and those of 4 bits at others, too."""
    low = [arm for arm in arms if arm["bits"] == 4]
    others = [
        {**arm, "name": arm["name"].replace("-4", f"-{bits}"), "bits": bits}
        for bits in more
        for arm in low
    ]
    return [*arms, *others]


def test_what_is_compared() -> None:
    arms = make_arms()
    by_name = {arm["name"]: arm for arm in arms}
    names = lambda name: [a["name"] for a in partners(by_name[name], arms)]  # noqa: E731
    assert names("teacher") == names("student") == []
    assert names("control") == ["student"]
    assert names("distil") == ["student", "control"]
    assert names("rtn-4") == ["student"]
    assert names("awq-4") == ["student", "rtn-4"]
    assert names("rtn-4-control") == ["control"]
    ptq = ["rtn-4", "gptq-4", "awq-4", "rtn-4-control"]
    assert names("qat-4") == ["student", "control", *ptq]
    variants = ["grace-no-gate-4", "grace-no-rcka-4"]
    assert names("grace-4") == ["student", "control", *ptq, "qat-4", "kd-4", *variants]
    assert names("grace-no-gate-4") == ["control"]
    kept = {name: (counterpart(by_name[name], arms) or {}).get("name") for name in by_name}
    assert (kept["rtn-4"], kept["rtn-4-control"]) == ("student", "control")
    assert (kept["qat-4"], kept["grace-4"], kept["grace-no-gate-4"]) == (
        "control", "distil", "distil",
    )  # fmt: skip


def test_verdicts_are_of_a_family_at_one_number_of_bits() -> None:
    arms = make_arms()
    found = compare(arms, Resampled(arms, draws=4000))
    by_pair = {(item.arm, item.to): item for item in found}
    assert by_pair["grace-4", "rtn-4"].verdict == ABOVE
    assert by_pair["rtn-4", "student"].verdict == BELOW
    assert by_pair["awq-4", "rtn-4"].adjusted >= by_pair["awq-4", "rtn-4"].difference.p
    low = [item for item in found if item.bits == 4]
    assert max(item.adjusted for item in low) <= 1
    smallest = min(low, key=lambda item: item.difference.p)
    assert smallest.adjusted == pytest.approx(min(1, len(low) * smallest.difference.p))
    assert {item.bits for item in found} == {4, 32}


def verdicts(arms: list[dict[str, Any]], entropy: Any = None) -> dict[str, str]:
    resampled = Resampled(arms, draws=4000)
    made = c.claims(arms, compare(arms, resampled), resampled, entropy)
    return {claim.text: claim.verdict for claim in made}


def test_claims_hold_where_the_numbers_say_so() -> None:
    answers = studies.questions(np.random.default_rng(1))
    found = verdicts(make_arms(), entropy_error(answers, "teacher-s0"))
    assert found["GRACE is above round-to-nearest"] == c.HOLDS
    assert found["GRACE is above AWQ"] == c.HOLDS
    assert found["GRACE is above QAT without a teacher"] == c.HOLDS
    assert found["relational alignment (RCKA) helps"] == c.UNSEPARATED
    assert found["scales of groups are above scales of rows"] == c.ABSENT
    assert found["GRACE is above RTN of the student trained on"] == c.HOLDS
    assert found["the teacher errs where its entropy is high"] == c.HOLDS
    assert found["RCKA brings visual tokens nearer to the teacher's (CKA)"] == c.HOLDS


def test_claims_fail_where_the_numbers_say_the_opposite() -> None:
    found = verdicts(make_arms(grace=0.4))
    assert found["GRACE is above round-to-nearest"] == c.FAILS
    assert found["the confidence gate helps"] == c.FAILS
    assert found["quantized GRACE keeps 97.8% of the distilled student"] == c.FAILS
    assert found["the teacher errs where its entropy is high"] == c.ABSENT
    even = verdicts(make_arms(rtn=0.85, distil=0.6))
    assert even["GRACE is above round-to-nearest"] == c.UNSEPARATED
    assert even["quantized GRACE keeps 97.8% of the distilled student"] == c.HOLDS
    assert even["distillation is above training on without a teacher, unquantized"] == c.FAILS


def test_one_seed_says_nothing_about_methods() -> None:
    arms = [{**arm, "seeds": arm["seeds"][:1]} for arm in make_arms()]
    resampled = Resampled(arms, draws=4000)
    by_pair = {(item.arm, item.to): item for item in compare(arms, resampled)}
    assert by_pair["grace-4", "rtn-4"].verdict == ONE_SEED
    assert by_pair["rtn-4", "student"].verdict == BELOW  # neither has any
    found = verdicts(arms)
    for text in (
        "GRACE is above round-to-nearest",
        "quantized GRACE keeps 97.8% of the distilled student",
        "RCKA brings visual tokens nearer to the teacher's (CKA)",
    ):
        assert found[text] == ONE_SEED, text
    # Another seed of one trained arm tells of all that trained, if roughly.
    for arm, full in zip(arms, make_arms(), strict=True):
        if arm["name"] == "qat-4":
            arm["seeds"] = full["seeds"]
    assert verdicts(arms)["GRACE is above round-to-nearest"] == c.UNSEPARATED


def test_alignment_is_read_against_its_spread_between_seeds() -> None:
    def arms(*after: float) -> list[dict[str, Any]]:
        made = make_arms()
        for arm in made:
            for seed, item in enumerate(arm["seeds"]):
                value = after[seed] if arm["name"] == "grace-4" else 0.6
                item["cka"] = {"before": 0.5, "after": value}
        return made

    text = "RCKA brings visual tokens nearer to the teacher's (CKA)"
    assert verdicts(arms(0.9, 0.91))[text] == c.HOLDS
    assert verdicts(arms(0.3, 0.31))[text] == c.FAILS
    assert verdicts(arms(0.65, 0.9))[text] == c.UNSEPARATED  # of two seeds, 12.7 standard errors


def test_the_numbers_decide_and_nothing_else() -> None:
    """The paper's own numbers stand at its bits only, and verdicts follow intervals."""
    arms = at_bits(make_arms(), 3)
    resampled = Resampled(arms, draws=1000)
    made = c.claims(arms, compare(arms, resampled), resampled, None)
    above = [claim for claim in made if claim.text == "GRACE is above round-to-nearest"]
    assert [(claim.bits, claim.paper) for claim in above] == [("4", "67.2 and 65.2"), ("3", "")]
    interval = resampled.ratio("grace-4", "distil")
    assert c.side_of(interval, interval.low) == c.HOLDS
    assert c.side_of(interval, interval.high) == c.UNSEPARATED
    assert c.side_of(interval, interval.high + 1e-6) == c.FAILS


def write(folder: Path, study: dict[str, Any], **options: Any) -> list[Path]:
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps(study))
    return write_report(folder / "study.json", **options)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    arms = make_arms()
    curve = [{"step": step, "ce": 1 / step, "beta": 0.1 * step} for step in (1, 2, 3)]
    betas = {"grace-4": {"0": [[1, 0.1], [2, 0.2]], "1": [[1, 0.1], [2, 0.15]]}}
    shown = studies.study(arms)["example"]
    return studies.study(
        arms,
        curves={"grace-4": curve},
        betas=betas,
        sweep=SWEEP,
        not_swept=["Nothing else is swept."],
        examples=[shown, {**shown, "question": "Another?", "image": studies.png("blue")}],
    )


@pytest.fixture(scope="module")
def run(whole: dict, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of the report."""
    answers = studies.questions(np.random.default_rng(1))
    known = {**whole, "teacher_entropy": as_json(entropy_error(answers, "teacher-s0"))}
    return write(tmp_path_factory.mktemp("report") / "run", known, svg=True)


def test_the_report_holds_everything_and_stands_alone(run: list[Path]) -> None:
    files, folder = run, run[0].parent
    charts = {"scores", "subtasks", "bits", "sizes", "differences", "curves", "beta", "entropy"}
    charts |= {"cka", "sweep"}
    assert {file.stem for file in files if file.suffix == ".png"} == charts
    assert {file.stem for file in files if file.suffix == ".svg"} == charts
    html = (folder / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == len(charts) + 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|url\(|@import|<script|<link", html)
    assert "Is it? &lt;b&gt;" in html
    markdown = (folder / "report.md").read_text()
    for name in charts:
        assert f"![{name}]({name}.png)" in markdown
    for text in (
        "## Paired differences", "## The paper's claims",
        "| GRACE is above round-to-nearest | 67.2 and 65.2 (4 bits) |",
        "Pearson's r", "the paper has 0.484", "0.001 (at the edge: learning_rate)",
        "0.0001 (at the edge: learning_rate, beta_init)", "Nothing else is swept.",
        "| GRACE, 4 bits | 0.500 | 0.900 | +0.400 |", "Another?",
        "by Student's t with the variance between seeds", "quantize to one grid, symmetric",
    ):  # fmt: skip
        assert text in markdown, text


def test_every_byte_comes_from_study_json(run: list[Path], tmp_path: Path) -> None:
    (tmp_path / "study.json").write_bytes((run[0].parent / "study.json").read_bytes())
    for file in write_report(tmp_path):
        assert file.read_bytes() == (run[0].parent / file.name).read_bytes(), file.name
    assert not re.search(r"<dc:date>", (run[0].parent / "curves.svg").read_text())


def test_numbers_in_the_tables_are_the_study_s(whole: dict) -> None:
    found = findings(whole)
    tables = {s.heading: s.tables[0] for s in sections(whole, found) if s.tables}
    totals = {row[0]: row[3] for row in tables["Scores"].rows}
    for arm in whole["arms"]:
        name = arm["label"] if arm["bits"] == 32 else f"{arm['label']}, 4 bits"
        assert totals[name].startswith(f"{arm['total']:.0f} [")
    by_name = {arm["name"]: arm["total"] for arm in whole["arms"]}
    kept = {row[0]: row[2:4] for row in tables["What is kept"].rows}
    share = 100 * by_name["grace-4"] / by_name["distil"]
    assert kept["GRACE, 4 bits"][1].startswith(f"{share:.1f} [")
    points = by_name["grace-4"] - by_name["rtn-4"]
    differences = {row[0]: row for row in tables["Paired differences"].rows}
    row = differences["GRACE, 4 bits − RTN, 4 bits"]
    assert row[1].startswith(f"{round(points):+d} [")
    assert row[4] == ABOVE


def test_many_bits_stand_beside_each_other(tmp_path: Path) -> None:
    arms = at_bits(make_arms(), 3, 2)
    write(tmp_path / "run", studies.study(arms))
    markdown = (tmp_path / "run" / "report.md").read_text()
    assert markdown.startswith("| method | not quantized | 4 bits | 3 bits | 2 bits |")
    (claim,) = re.findall(r"^\| GRACE is above round-to-nearest .*", markdown, re.MULTILINE)
    assert claim.count("| holds: +") == 3
    assert "<details><summary>31 rows</summary>\n\n| method | existence |" in markdown
    html = (tmp_path / "run" / "report.html").read_text()
    assert html.count("<details>") == html.count("</details>") == markdown.count("<details>")
    assert '<td class="good">holds: +' in html
    (absent,) = re.findall(r"^\| the adaptive β helps .*", markdown, re.MULTILINE)
    assert absent == f"| the adaptive β helps |  |  | {' | '.join([c.ABSENT] * 3)} |"


def test_what_differs_between_seeds_is_told_seed_by_seed() -> None:
    arms = make_arms()
    grace = next(arm for arm in arms if arm["name"] == "grace-4")
    for seed, digit in zip(grace["seeds"], "12", strict=True):
        seed["right"] = {**seed["right"], "count": digit * 200}
    made = sections(studies.study(arms), findings(studies.study(arms)))
    (section,) = [s for s in made if s.heading == "Between seeds"]
    rows = {row[0]: row[1:] for row in section.tables[0].rows}
    assert section.tables[0].header == ["method", "not quantized", "4 bits"]
    assert rows["GRACE"] == ["", "50 / 200"]
    assert "RTN" not in rows
    assert "differ the most in count" in section.notes[0]
    assert section.notes[0].endswith("seed by seed (0, 1).")
    once = [{**arm, "seeds": arm["seeds"][:1]} for arm in arms]
    made = sections(studies.study(once), findings(studies.study(once)))
    assert not [s for s in made if s.heading == "Between seeds"]


def test_examples_are_told_by_answer() -> None:
    arms = at_bits(make_arms(), 3)
    study = studies.study(arms)
    said = dict.fromkeys(study["example"]["answers"], "Yes") | {"student": "red", "rtn-3": "No"}
    said |= {"rtn-4": "No", "gptq-3": "No"}
    shown = example(study, {**study["example"], "answers": said, "truth": "No"})
    assert [(answer.text, answer.right) for answer in shown.answers] == [
        ("No", True), ("Yes", False), ("red", False),
    ]  # fmt: skip
    no, yes, red = (answer.arms for answer in shown.answers)
    assert no == "RTN (4, 3 bits); GPTQ (3 bits)"
    assert red == "STUDENT"
    assert {"TEACHER", "GPTQ (4 bits)", "GRACE (4, 3 bits)"} <= set(yes.split("; "))
    del said["grace-4"]  # of a study whose example has not all arms
    assert "GRACE (3 bits)" in example(study, {**study["example"], "answers": said}).answers[0].arms


def test_agreement_is_a_range(whole: dict) -> None:
    def told(*rates: float) -> str:
        arms = [dict(arm) for arm in whole["arms"]]
        for arm, rate in zip(arms[4:], rates, strict=False):
            arm |= {"deployed": True, "agreement": rate}
        (note,) = [n for n in footnotes({**whole, "arms": arms}) if "agree with" in n]
        return note

    worst = whole["arms"][5]["label"]
    assert told(0.999, 0.985, 0.99).endswith(f"model's: 98.50% ({worst}, 4 bits) to 99.90%.")
    assert told(1.0, 1.0).endswith("model's: 100.00%.")


def test_a_study_with_nothing_optional(tmp_path: Path) -> None:
    right = studies.rights(np.random.default_rng(0), 0.7, images=6)
    arms = [studies.arm("student", right), studies.arm("rtn-4", right, bits=4)]
    for arm in arms:
        del arm["start"], arm["cka"]
        for seed in arm["seeds"]:
            del seed["cka"]
    files = write(tmp_path / "run", studies.study(arms))
    assert {file.stem for file in files} == {"report", "scores", "subtasks", "bits", "sizes"}
    markdown = (tmp_path / "run" / "report.md").read_text()
    assert "| RTN, 4 bits − STUDENT | +0 [+0, +0] | 1 | 1 | not separated |" in markdown
    assert "entropy and its errors" not in markdown
    assert "in no interval" in markdown


def test_a_teacher_without_errors_has_no_correlation(whole: dict) -> None:
    summary = {"questions": 50, "errors": 0, "mean": 0.1, "r": None}
    found = from_json(summary)
    assert found is not None
    assert found.r is None
    made = findings({**whole, "teacher_entropy": summary})
    notes = [s.notes for s in sections(whole, made) if s.heading.startswith("The teacher")]
    assert notes == [["The teacher has 0 of 50 answers wrong: nothing can go with its entropy."]]
    of = {**summary, "questions": 500, "errors": 40, "r": 0.4, "low": 0.3, "high": 0.5}
    known = from_json(of)
    assert known is not None
    assert known.r == Interval(0.4, 0.3, 0.5)
    text = "the teacher errs where its entropy is high"
    assert verdicts(make_arms(), known)[text] == c.HOLDS
    few = from_json({**of, "errors": c.FEWEST - 1})
    assert verdicts(make_arms(), few)[text] == c.UNSEPARATED
    without = {name: of[name] for name in summary}  # of a study that kept no interval
    assert verdicts(make_arms(), from_json(without))[text] == (c.UNSEPARATED)


def test_what_study_json_keeps_of_the_entropy_is_all_of_it() -> None:
    found = entropy_error(studies.questions(np.random.default_rng(1)), "teacher-s0")
    assert from_json(json.loads(json.dumps(as_json(found)))) == found
    assert sum(share for _, share, _ in found.bins) == pytest.approx(
        10 * found.errors / found.questions
    )


def test_what_is_unfinished_and_asymmetric_is_told(whole: dict) -> None:
    right = [whole["arms"][1]["seeds"][0]["right"]]
    other = studies.arm("gptq-asymmetric-4", right, bits=4)
    left = ["grace-3-s0", "grace-3-s2", "rtn-4-control-s1"]
    known = {**whole, "arms": [*whole["arms"], other], "unfinished": left}
    notes = footnotes(known)
    assert "Not run yet: grace-3 (seeds 0, 2), rtn-4-control (seed 1)." in notes
    assert any("asymmetric ones have zero points" in note for note in notes)
    assert not any("asymmetric ones" in note for note in footnotes(whole))
    arms = make_arms()
    arms.insert(5, studies.arm("rtn-asymmetric-4-control", right, bits=4, start="control"))
    assert "GRACE is above asymmetric RTN of the student trained on" in verdicts(arms)


def test_charts_of_many_arms_have_a_panel_a_number_of_bits(tmp_path: Path) -> None:
    """What 8, 4, 3 and 2 bits need is drawn at a size that shows it."""
    from PIL import Image

    few = make_arms()
    sizes = {}
    for name, arms in (("few", few), ("many", at_bits(few, 3, 2))):
        curve = [{"step": step, "ce": 1 / step, "rcka": 0.1} for step in (1, 2)]
        curves = {arm["name"]: curve for arm in arms if arm["trained"]}
        write(tmp_path / name, studies.study(arms, curves=curves))
        for chart in ("scores", "differences", "curves"):
            with Image.open(tmp_path / name / f"{chart}.png") as image:
                sizes[name, chart] = image.size
    for chart in ("scores", "differences"):
        assert sizes["many", chart][0] == 2 * sizes["few", chart][0], chart  # two beside each other
        assert sizes["many", chart][1] == 2 * sizes["few", chart][1], chart
    # A line of panels for what is not quantized and for each number of bits.
    assert sizes["many", "curves"][1] * 2 == sizes["few", "curves"][1] * 4
    text = {name: (tmp_path / name / "report.md").read_text() for name in ("few", "many")}
    head = "| method | not quantized | 4 bits | 3 bits | 2 bits |"
    assert head in text["many"]
    assert head not in text["few"]
    row = next(line for line in text["many"].split(head)[1].splitlines() if "| GRACE |" in line)
    total = Resampled(at_bits(few, 3, 2)).total("grace-3")
    assert row.split("|")[4].strip() == f"{total.value:.0f} [{total.low:.0f}, {total.high:.0f}]"

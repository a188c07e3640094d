"""Intervals, p values and correlations against closed forms, and where the truth is known."""

from __future__ import annotations

import made_studies as studies
import numpy as np
import pytest

from grace.study.answers import disagreements, entropy_error, pearson, wordings
from grace.study.resampling import Resampled, cluster_counts, holm, p_value
from grace.study.statistics import pair_scores, paired_difference, total_error


def test_the_interval_is_that_of_the_standard_error() -> None:
    right = studies.rights(np.random.default_rng(0), 0.7, images=800)
    found = Resampled([studies.arm("rtn-4", right, bits=4)])
    total = found.total("rtn-4")
    values = [pair_scores(right[0][name]) for name in ("existence", "count")]
    assert total.value == pytest.approx(sum(v.mean() for v in values))
    width = 1.96 * total_error(right)
    assert total.high - total.value == pytest.approx(width, rel=0.06)
    assert total.value - total.low == pytest.approx(width, rel=0.06)
    part = found.subtask("rtn-4", "count")
    assert part.high - part.low == pytest.approx(2 * 1.96 * values[1].std() / 20, rel=0.06)


def test_differences_are_paired_by_image() -> None:
    random = np.random.default_rng(1)
    one = studies.rights(random, 0.7, images=400)
    other = [{name: digits[:-20] + "0" * 20 for name, digits in one[0].items()}]
    far = studies.rights(random, 0.7, images=400)
    arms = [studies.arm(n, r) for n, r in (("a", one), ("b", other), ("c", far), ("d", one))]
    found = Resampled(arms)
    near, apart = found.difference("a", "b"), found.difference("a", "c")
    points, error = paired_difference(one, other)
    assert near.value == pytest.approx(points)
    assert near.high - near.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert near.high - near.low < 0.5 * (apart.high - apart.low)
    same = found.difference("a", "d")
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert found.difference("b", "a").value == -near.value


def _grouped(random: np.random.Generator, groups: int, pairs: int) -> str:
    """Digits of images: what is known of a group is known in all its pairs."""
    share = np.repeat(random.choice([0.5, 0.9], groups), 2 * pairs)
    return "".join(map(str, random.binomial(2, share)))


def test_pairs_that_ask_the_same_are_drawn_together() -> None:
    """The interval is that of the mean over groups, of a difference as of a score; of groups of one
    pair that of pairs."""
    random = np.random.default_rng(6)
    one, other = ([{"count": _grouped(random, 60, 8)}] for _ in range(2))
    arms = [studies.arm("a", one), studies.arm("b", other)]
    groups = np.repeat(np.arange(60), 8)
    order = random.permutation(480)  # wherever they stand
    for arm in arms:
        (seed,) = arm["seeds"]
        pairs = np.array(list(seed["right"]["count"])).reshape(480, 2)[order]
        seed["right"] = {"count": "".join(pairs.ravel())}
    found = Resampled(arms, {"count": groups[order].tolist()})
    values = [pair_scores(arm["seeds"][0]["right"]["count"]) for arm in arms]
    means = [[v[groups[order] == group].mean() for group in range(60)] for v in values]
    width = 2 * 1.96 * np.std(means[0], ddof=1) / np.sqrt(60)
    total = found.total("a")
    assert total.value == pytest.approx(values[0].mean())
    assert total.high - total.low == pytest.approx(width, rel=0.06)
    apart = found.difference("a", "b")
    width = 2 * 1.96 * np.std(np.subtract(*means), ddof=1) / np.sqrt(60)
    assert apart.high - apart.low == pytest.approx(width, rel=0.06)
    alone = Resampled(arms).total("a")
    assert alone.high - alone.low < 0.6 * (total.high - total.low)
    assert Resampled(arms, {"count": list(range(480))}).total("a") == alone
    with pytest.raises(ValueError, match="wordings of count must be a number for each of 480"):
        Resampled(arms, {"count": [0, 1]})


def test_groups_weigh_as_many_pairs_as_they_have() -> None:
    """A mean over drawn pairs, not over groups: unequal groups move no estimate."""
    right = [{"count": "2222" * 15 + "0000" * 5}]  # 30 pairs in one group, ten alone
    found = Resampled([studies.arm("a", right)], {"count": [0] * 30 + list(range(1, 11))})
    assert found.total("a").value == 150
    drawn = found._total("a")
    assert set(np.unique(drawn)) <= {200 * 3 * k / (3 * k + (11 - k) / 10) for k in range(12)}


def test_wordings_are_numbered_by_what_pairs_ask() -> None:
    questions = ["a?", "b?"] * 2 + ["b?", "a?"] * 2 + ["a?", "c?"] * 2 + ["a?", "b?"] * 2 + ["a?"]
    subtask = ["one"] * 12 + ["two"] * 5
    images = [n // 2 for n in range(16)] + [8]
    answers = {
        "subtask": np.array(subtask), "image": np.array(images), "question": np.array(questions)
    }  # fmt: skip
    assert wordings(answers) == {"one": [0, 0, 1], "two": [2]}  # the last image is alone
    # Four copies of a question are no more than one: the interval of r is as wide.
    known = studies.questions(np.random.default_rng(7), 400)
    more = {name: np.tile(values, 4) for name, values in known.items()}
    more["image"] = np.arange(1600, dtype=np.int32) // 2
    one, four = (entropy_error(each, "teacher-s0").r for each in (known, more))
    assert one is not None
    assert four is not None
    assert four.high - four.low == pytest.approx(one.high - one.low, rel=0.1)


def test_seeds_widen_by_t_times_the_standard_error_of_their_mean() -> None:
    """Without spread over images all of it is between seeds: t of 3 degrees of freedom."""
    right = [{"count": digit} for digit in ("2222", "1111", "2222", "0000")]
    found = Resampled([studies.arm("qat-4", right, bits=4, trained=True)], draws=40_000)
    drawn = found._total("qat-4")
    low, high = np.percentile(drawn, [2.5, 97.5])
    width = 3.182 * np.array([200.0, 50.0, 200.0, 0.0]).std(ddof=1) / 2
    assert (high - low) / 2 == pytest.approx(width, rel=0.04)
    assert np.median(drawn) == pytest.approx(112.5, abs=2)


def test_the_spread_between_seeds_is_that_of_all_arms_of_a_kind() -> None:
    """At the arm's bits where these are enough, else at all bits, else of all that have seeds."""
    still = [{"count": "1111"}] * 3
    moved = [{"count": digits} for digits in ("1111", "2222", "0000")]

    def width(*more: tuple[str, int, dict]) -> float:
        arms = [studies.arm("a-4", still, bits=4, trained=True)]
        arms += [
            studies.arm(f"{name}-{bits}", moved, bits=bits, **options)
            for name, bits, options in more
        ]
        found = Resampled([*arms, studies.arm("student", still[:1])]).difference("a-4", "student")
        return found.high - found.low

    trained = {"trained": True}
    assert width() == 0
    same = width(("b", 4, trained))  # s² of both, t of 4
    spread = np.array([50.0, 200.0, 0.0]).var(ddof=1)
    assert same == pytest.approx(2 * 2.776 * np.sqrt(spread / 2 / 3), rel=0.06)
    assert width(("b", 2, trained)) == pytest.approx(same, rel=1e-6)  # 2 of 4 alone are too few
    started = {"start": "control"}  # another kind, where there is no more
    assert width(("rtn", 2, started)) == pytest.approx(same, rel=1e-6)
    both = width(("b", 4, trained), ("c", 2, trained), ("rtn", 4, started))
    assert both == pytest.approx(same, rel=0.06)  # enough at 4 bits: others do not count


def _of_seeds(name: str, *arms: dict) -> float:
    """Standard deviation of what another seed would change."""
    return float(np.std(Resampled(list(arms))._seeds[name]["count"]))


def test_arms_without_a_teacher_have_a_spread_of_their_own() -> None:
    ways = (("1122", "1112", "1111"), ("1111", "2222", "0000"))
    near, far = ([{"count": digits} for digits in three] for three in ways)
    qat = [studies.arm(f"qat-{b}", near, bits=b, trained=True) for b in (8, 4)]
    grace = [studies.arm(f"grace-{b}", far, bits=b, trained=True) for b in (8, 4)]
    control = studies.arm("control", near, trained=True)
    own = np.array([125.0, 87.5, 50.0]).std(ddof=1) / np.sqrt(3) * np.sqrt(6 / 4)  # t of 6
    assert _of_seeds("control", control, *qat, *grace) == pytest.approx(own, rel=0.05)
    assert _of_seeds("grace-4", control, *qat, *grace) > 2 * own


def test_an_arm_that_varies_more_than_others_keeps_its_own_spread() -> None:
    near, far = ([{"count": d} for d in three] for three in (("11",) * 3, ("11", "22", "00")))
    calm = [studies.arm(name, near, bits=4, trained=True) for name in "bcde"]
    wild = studies.arm("a", far, bits=4, trained=True)
    own = np.array([50.0, 200.0, 0.0]).std(ddof=1) / np.sqrt(3) * np.sqrt(10 / 8)  # t of 10
    assert _of_seeds("a", wild, *calm) == pytest.approx(own, rel=0.05)
    assert _of_seeds("b", wild, *calm) == pytest.approx(own / np.sqrt(5), rel=0.05)


def test_with_one_seed_each_their_spread_is_unknown() -> None:
    right = [{"count": "2211"}]
    arms = [
        studies.arm("student", right),
        studies.arm("rtn-4", right, bits=4),
        studies.arm("rtn-4-control", right, bits=4, start="control"),
        studies.arm("qat-4", right, bits=4, trained=True),
    ]
    found = Resampled(arms)
    known = {arm["name"]: found.knows_seeds(arm["name"]) for arm in arms}
    assert known == {"student": True, "rtn-4": True, "rtn-4-control": False, "qat-4": False}
    # One that ran twice tells of the others of its kind.
    arms.append(studies.arm("kd-4", right * 2, bits=4, trained=True))
    assert Resampled(arms).knows_seeds("qat-4")


@pytest.mark.parametrize("seeds", [2, 3, 6])
@pytest.mark.parametrize("effect", [0.0, 0.02, 0.05])
def test_the_truth_is_in_95_percent_of_the_intervals(seeds: int, effect: float) -> None:
    """Studies drawn from a known distribution: twins share a difficulty, seeds have an effect."""
    random, hits, low_p, times = np.random.default_rng(2), 0, 0, 250
    # E[points of an image] = 100 p + 100 p², at p = share + difficulty + seed's effect.
    spread = 0.15**2 + effect**2
    truth = {share: 100 * share + 100 * (share**2 + spread) for share in (0.5, 0.6)}
    for _ in range(times):
        hard = np.repeat(random.choice([-0.15, 0.15], 60), 2)
        arms = []
        for name, share in (("a", 0.6), ("b", 0.5), ("c", 0.5), ("d", 0.5)):
            rows = []
            for _ in range(seeds):
                shift = effect * random.choice([-1, 1])
                counts = random.binomial(2, share + hard + shift)
                rows.append({"count": "".join(map(str, counts))})
            arms.append(studies.arm(name, rows, bits=4, trained=True))
        found = Resampled(arms, draws=400, seed=int(random.integers(1 << 30)))
        difference = found.difference("a", "b")
        hits += difference.low <= truth[0.6] - truth[0.5] <= difference.high
        low_p += found.difference("b", "c").p <= 0.05
    assert hits / times >= 0.92
    assert low_p / times <= 0.08


def test_no_interval_goes_beyond_what_there_is() -> None:
    right = [{"count": digits} for digits in ("2222222221", "2222222222", "2222222211")]
    found = Resampled([studies.arm("qat-4", right, bits=4, trained=True)])
    for interval in (found.total("qat-4"), found.subtask("qat-4", "count")):
        assert interval.low < interval.value <= interval.high <= 200


def test_p_values_by_hand() -> None:
    assert p_value(np.array([1.0] * 99)) == pytest.approx(2 / 100)
    assert p_value(np.array([1.0] * 90 + [-1.0] * 9)) == pytest.approx(20 / 100)
    assert p_value(np.zeros(99)) == 1.0
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.5, 0.6]), [1.0, 1.0])
    assert holm([]) == []


def test_clusters_are_drawn_with_replacement() -> None:
    counts = cluster_counts(50, 4000, np.random.default_rng(3))
    assert (counts.sum(1) == 50).all()
    assert counts.mean(0) == pytest.approx(1.0, abs=0.08)
    assert counts.var() == pytest.approx(1 - 1 / 50, rel=0.03)


def test_pearson_and_its_interval() -> None:
    random = np.random.default_rng(4)
    x = random.normal(size=400)
    y = 0.5 * x + np.sqrt(0.75) * random.normal(size=400)
    found = pearson(x, y, np.arange(400))
    assert found is not None
    assert found.value == pytest.approx(np.corrcoef(x, y)[0, 1])
    low, high = np.tanh(np.arctanh(found.value) + np.array([-1, 1]) * 1.96 / np.sqrt(397))  # Fisher
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)
    twice = pearson(np.repeat(x, 4), np.repeat(y, 4), np.repeat(np.arange(400), 4))
    assert twice is not None  # four copies of each are no more than one
    assert twice.high - twice.low == pytest.approx(found.high - found.low, rel=0.1)
    assert pearson(x, np.zeros(400), np.arange(400)) is None


def test_a_total_of_nothing_has_no_share() -> None:
    zero, one = [{"count": "0000"}], [{"count": "2200"}]
    found = Resampled([studies.arm("a", one), studies.arm("b", zero)])
    assert np.isnan(found.ratio("a", "b").value)
    assert found.ratio("b", "a").value == 0
    assert found.ratio("a", "a").value == 1


def test_disagreements_go_around_the_subtasks() -> None:
    answers = studies.questions(np.random.default_rng(5))
    chosen = disagreements(answers, ["rtn-4-s0", "grace-4-s0"], count=4)
    assert len(set(chosen)) == 4
    assert [answers["subtask"][i] for i in chosen].count("count") == 2
    for index in chosen:
        assert answers["said.rtn-4-s0"][index] != answers["said.grace-4-s0"][index]
        assert answers["right.teacher-s0"][index]
    assert disagreements(answers, ["rtn-4-s0", "rtn-4-s0"]) == []

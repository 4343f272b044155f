"""Intervals, benchmark metrics and the Codeforces rating, against known values and brute force."""

from __future__ import annotations

import json
import math
import random

import pytest

from r1kern.errors import UserError
from r1kern.eval.codeforces import (
    codeforces_metrics,
    expected_rating,
    percentile,
    rate,
    read_contest,
)
from r1kern.eval.measures import measure
from r1kern.eval.metrics import confidence_interval, wilson_interval
from r1kern.types import Completion, Prompt, Rollout, Score


@pytest.mark.parametrize(
    ("c", "n", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_the_published_ones(c, n, low, high):
    assert wilson_interval(c, n) == pytest.approx((low, high), abs=5e-5)
    rows = [[i < c] for i in range(n)]
    assert confidence_interval(rows) == wilson_interval(c, n)


def test_the_interval_over_problems_covers():
    """Of 400 sets of 60 problems with rates of their own, about 95 % hold the true mean rate."""
    generator = random.Random(0)
    covered = 0
    for _ in range(400):
        rates = [generator.betavariate(2, 1) for _ in range(60)]
        rows = [[generator.random() < p for _ in range(8)] for p in rates]
        low, high = confidence_interval(rows)
        covered += low <= 2 / 3 <= high
    assert 0.92 <= covered / 400 <= 0.975


def test_the_interval_stays_within_0_and_1():
    assert confidence_interval([[True] * 4] * 5) == (1.0, 1.0)
    low, high = confidence_interval([[True, True], [True, True], [True, False]])
    assert 0 < low < high == 1.0


def rollout(name, answer, samples, *, task="math") -> Rollout:
    """Samples as (text, correct or None, tokens, finish)."""
    return Rollout(
        Prompt(name, (1,), answer, "", task=task),
        tuple(Completion((1,) * n, (), text, finish) for text, _, n, finish in samples),
        0,
        tuple(
            Score({"format": 0.0}, 0.0, "deadline")
            if correct is None
            else Score({"accuracy": float(correct), "format": 1.0}, 0.0)
            for _, correct, _, _ in samples
        ),
    )


def boxed(answer) -> str:
    return f"So \\boxed{{{answer}}}."


def test_metrics_of_a_benchmark():
    half = [(boxed("1/2"), True, 2, "stop"), (boxed("0.5"), True, 4, "stop")]
    wrong = [(boxed("3"), False, 6, "stop")] * 2
    silent = [("<think> is it 3?", False, 8, "length")] * 3
    metrics = measure(
        [
            # equal answers vote together, the samples that mark no answer have no vote
            rollout("a", "0.5", [*half, *wrong[:1], *silent]),
            rollout("b", "3", [*half, *wrong[:1], *silent]),
            # a grader's failure is neither right nor wrong
            rollout("c", "0.5", [*half, *half, ("", None, 0, "stop"), *wrong[:1]]),
        ]
    )
    assert metrics["problems"] == 3 and metrics["samples"] == 6
    assert metrics["pass@1"] == pytest.approx((2 / 6 + 2 / 6 + 4 / 5) / 3)
    at_2 = 1 - math.comb(4, 2) / math.comb(6, 2)
    assert metrics["pass@2"] == pytest.approx((at_2 + at_2 + 1) / 3)
    assert metrics["pass@4"] == pytest.approx((1 - 1 / 15 + 1 - 1 / 15 + 1) / 3)
    assert "pass@8" not in metrics
    assert metrics["cons@6"] == pytest.approx(2 / 3)
    assert metrics["truncated"] == pytest.approx(6 / 18)
    assert metrics["tokens"] == pytest.approx((36 + 36 + 18) / 18)
    assert metrics["grader_failures"] == 1 and metrics["unjudged_problems"] == 0
    assert metrics["format"] == pytest.approx(17 / 18)


def test_programs_have_no_vote_and_the_unjudged_no_rate():
    failed = rollout("a", "", [("x", None, 1, "stop")] * 2, task="code")
    metrics = measure([failed])
    assert metrics["pass@1"] is None and metrics["interval"] is None
    assert metrics["unjudged_problems"] == 1 and metrics["grader_failures"] == 2
    assert not any(name.startswith("cons") for name in metrics)
    single = measure([rollout("a", "", [("x", True, 1, "stop")], task="code")])
    assert single["interval_kind"] == "Wilson" and single["interval"] == [*wilson_interval(1, 1)]


# -- Codeforces -----------------------------------------------------------------------------


def log_likelihood(r, games) -> float:
    chances = [1 / (1 + 10 ** ((rival - r) / 400)) for rival, _ in games]
    return sum(
        won * math.log(p) + (1 - won) * math.log(1 - p)
        for p, (_, won) in zip(chances, games, strict=True)
    )


def test_the_rating_maximises_the_likelihood():
    generator = random.Random(1)
    for _ in range(6):
        rivals = [generator.gauss(1500, 350) for _ in range(30)]
        wins = [generator.choice([0, 0.5, 1]) for _ in rivals]
        wins[:2] = 0, 1
        games = list(zip(rivals, wins, strict=True))
        best = max(range(4000), key=lambda r: log_likelihood(r, games))
        losses = len(wins) - sum(wins)
        if 0 < best < max(rivals) + 399:
            assert expected_rating(rivals, losses) == pytest.approx(best, abs=1)


@pytest.mark.parametrize(
    ("rivals", "losses", "rating"),
    [
        ([1500] * 10, 5, 1500),
        ([1500] * 11, 1, 1900),  # odds of 10 to 1 are 400 points
        ([1000, 2000], 1, 1500),
        ([1500, 1600], 0, 2000),  # beat everyone: the best rival's + 400
        ([1500, 1600], 2, 0),
    ],
)
def test_known_ratings(rivals, losses, rating):
    assert expected_rating(rivals, losses) == pytest.approx(rating, abs=0.02)


def test_impossible_games_are_refused():
    for rivals, losses in (([], 0), ([1500], 2), ([1500], -1)):
        with pytest.raises(ValueError, match="losses"):
            expected_rating(rivals, losses)


def write_contest(folder, name, *, problems, rows):
    """As Codeforces' API answers, with one participant that has no rating."""
    table = [
        {"points": p, "penalty": m, "party": {"members": [{"handle": f"u{i}"}]}}
        for i, (p, m, _) in enumerate(rows)
    ]
    table.append({"points": 9e9, "penalty": 0, "party": {"members": [{"handle": "unrated"}]}})
    standings = {"status": "OK", "result": {"problems": problems, "rows": table}}
    changes = [{"handle": f"u{i}", "oldRating": r} for i, (_, _, r) in enumerate(rows)]
    (folder / f"{name}.standings.json").write_text(json.dumps(standings))
    (folder / f"{name}.ratings.json").write_text(json.dumps({"status": "OK", "result": changes}))


def test_rating_over_contests(tmp_path):
    points = [{"index": "A", "points": 500.0}, {"index": "B", "points": 1000.0}]
    # the model: A at the second attempt (450 points), B never; ties with the second
    rows = [(1500, 0, 1900), (450, 0, 1500), (400, 0, 1200), (0, 0, 800)]
    write_contest(tmp_path, "10", problems=points, rows=rows)
    # here problems count and minutes break ties: 1 problem, 10 minutes
    rows = [(1, 5, 1700), (1, 10, 1500), (1, 30, 1300)]
    write_contest(tmp_path, "11", problems=[{"index": "A"}], rows=rows)
    contests = {name: read_contest(tmp_path / f"{name}.standings.json") for name in ("10", "11")}
    attempts = {"10A": [False, True], "10B": [False, False], "11A": [False, True]}
    rating, single = rate(attempts, contests)
    assert single["10"] == expected_rating([1900, 1500, 1200, 800], 1.5)
    assert single["11"] == expected_rating([1700, 1500, 1300], 1.5)
    assert rating == expected_rating([1900, 1500, 1200, 800, 1700, 1500, 1300], 3)

    samples = [
        rollout(name, "", [("", ok, 1, "stop") for ok in tries], task="code")
        for name, tries in {**attempts, "12A": [True]}.items()
    ]
    (tmp_path / "users.json").write_text(json.dumps({"result": [{"rating": 1}, {"rating": 4000}]}))
    metrics = codeforces_metrics(samples, tmp_path, tmp_path / "users.json")
    assert metrics["rating"] == round(rating) and set(metrics["contests"]) == {"10", "11"}
    assert metrics["percentile"] == 50.0 and metrics["humans"] == 2


def test_percentile_is_the_share_below():
    assert percentile(1500, [1000, 1200, 1500, 1500, 2000]) == 40.0
    with pytest.raises(ValueError, match="human ratings"):
        percentile(1500, [])


def test_files_that_are_not_the_apis(tmp_path):
    samples = [rollout("10A", "", [("", True, 1, "stop")], task="code")]
    with pytest.raises(UserError, match=r"standings of none of the 1 contests.*ID.standings.json"):
        codeforces_metrics(samples, tmp_path, None)
    write_contest(tmp_path, "10", problems=[{"index": "A"}], rows=[(1, 0, 1500)])
    (tmp_path / "10.ratings.json").write_text('[{"handle": "u0"}]')
    with pytest.raises(UserError, match=r"10.standings.json and 10.ratings.json.*oldRating"):
        codeforces_metrics(samples, tmp_path, None)
    (tmp_path / "10.ratings.json").write_text("{")
    with pytest.raises(UserError, match=r"10.ratings.json cannot be read as JSON"):
        codeforces_metrics(samples, tmp_path, None)

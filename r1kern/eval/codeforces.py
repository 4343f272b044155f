"""Codeforces: the rating that a model's solves in past contests amount to, and its percentile.

The contests' standings and the human ratings are the user's to bring, as Codeforces' API gives
them; see docs/evaluation.md.
"""

from __future__ import annotations

import bisect
import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from r1kern.errors import UserError
from r1kern.types import Rollout

_log = logging.getLogger(__name__)
WRONG_POINTS, WRONG_MINUTES = 50, 10  # penalty of a wrong attempt, by points or by problems


class Contest(NamedTuple):
    """A contest that humans took part in.

    Attributes:
        points: of each problem by index; None where the contest counts problems.
        rows: (points, penalty, rating before the contest) of each rated participant.
    """

    points: dict[str, float | None]
    rows: list[tuple[float, float, float]]


def expected_rating(rivals: Iterable[float], losses: float) -> float:
    """The maximum-likelihood Elo rating of a player who lost `losses` games to `rivals`.

    A player of rating r beats one of rating r_i with probability
    p_i(r) = 1 / (1 + 10^((r_i - r) / 400)). For wins w_i in {0, 1/2, 1} the log-likelihood is
    sum_i w_i log p_i + (1 - w_i) log(1 - p_i); its derivative vanishes where the expected losses
    are those seen:

        sum_i 1 / (1 + 10^((r - r_i) / 400)) = losses.

    This is the equation of CodeElo (arXiv 2501.01257), where the losses are a model's rank in a
    contest. Two differences: CodeElo solves it contest by contest and takes the mean, which needs
    a bound for a contest in which the model beats everyone, while the pooled games of all contests
    have one solution; and its code adds 1 to the expected rank but counts the rank seen from 0, a
    shift of one place.

    Args:
        rivals: ratings r_i, one a game.
        losses: games lost, ties counting one half.

    Returns:
        r, no less than 0 and no more than the best rival's rating + 400, which are what lost and
        won every game gives.

    Raises:
        ValueError: no rivals, or losses outside of [0, number of rivals].
    """
    rivals = list(rivals)
    if not rivals or not 0 <= losses <= len(rivals):
        raise ValueError(f"{losses} losses in {len(rivals)} games have no rating")
    low, high = 0.0, max(rivals) + 400.0
    while high - low > 0.01:
        middle = (low + high) / 2
        expected = sum(1 / (1 + 10 ** ((middle - rival) / 400)) for rival in rivals)
        low, high = (middle, high) if expected > losses else (low, middle)
    return (low + high) / 2


def percentile(rating: float, human_ratings: Iterable[float]) -> float:
    """Share of humans with a lower rating, in per cent; `human_ratings` is sorted.

    Raises:
        ValueError: there are none.
    """
    ratings = list(human_ratings)
    if not ratings:
        raise ValueError("a percentile needs human ratings")
    return 100 * bisect.bisect_left(ratings, rating) / len(ratings)


def rate(
    attempts: Mapping[str, list[bool]], contests: Mapping[str, Contest]
) -> tuple[float, dict[str, float]]:
    """The model's rating over all contests, and in each (the mean of which is CodeElo's).

    The samples of a problem are its attempts, in order, until the first right one. A solved
    problem brings its points less 50 for each wrong attempt before, or, where the contest counts
    problems, one problem and 10 minutes for each, as CodeElo counts. Humans also lose points with
    time, the model does not: the rating errs in its favour.

    Args:
        attempts: correctness of the samples by problem, CONTEST + INDEX.

    Raises:
        ValueError: no contest.
    """
    rivals, losses, single = [], 0.0, {}
    for name, contest in contests.items():
        score, penalty = _score(name, contest, attempts)
        lost = 0.0
        for points, minutes, _ in contest.rows:
            above = (points, -minutes) > (score, -penalty)
            lost += 1.0 if above else 0.5 * ((points, minutes) == (score, penalty))
        ratings = [rating for _, _, rating in contest.rows]
        single[name] = expected_rating(ratings, lost)
        rivals += ratings
        losses += lost
    return expected_rating(rivals, losses), single


def _score(name: str, contest: Contest, attempts: Mapping[str, list[bool]]) -> tuple[float, float]:
    score = penalty = 0.0
    for index, points in contest.points.items():
        tries = attempts.get(name + index, [])
        if not any(tries):
            continue
        wrong = tries.index(True)
        score += 1 if points is None else max(0.0, points - WRONG_POINTS * wrong)
        penalty += WRONG_MINUTES * wrong if points is None else 0
    return score, penalty


def codeforces_metrics(
    rollouts: Iterable[Rollout], standings: Path, ratings: Path | None
) -> dict[str, object]:
    """Rating over the contests that samples and standings have in common, and its percentile.

    Args:
        standings: folder with `ID.standings.json` and `ID.ratings.json` of every contest: what
            Codeforces' API answers to `contest.standings` and `contest.ratingChanges`.
        ratings: what it answers to `user.ratedList`, or a JSON list of numbers.

    Raises:
        UserError: a file is missing or malformed, or no contest has standings.
    """
    attempts = {r.prompt.id: [s.terms.get("accuracy") == 1.0 for s in r.scores] for r in rollouts}
    ids = {match[1] for name in attempts if (match := re.match(r"(\d+)[A-Z]", name))}
    paths = {name: standings / f"{name}.standings.json" for name in sorted(ids)}
    found = {name: path for name, path in paths.items() if path.is_file()}
    if not found:
        raise UserError(
            f"{standings} holds the standings of none of the {len(ids)} contests asked: save "
            "codeforces.com/api/contest.standings?contestId=ID as ID.standings.json"
        )
    if len(found) < len(ids):
        _log.info("rating over %d of %d contests: the others lack standings", len(found), len(ids))
    contests = {name: read_contest(path) for name, path in found.items()}
    rating, single = rate(attempts, contests)
    metrics = {"rating": round(rating), "contests": {n: round(r) for n, r in single.items()}}
    if ratings is not None:
        humans = sorted(read_ratings(ratings))
        metrics |= {"percentile": percentile(rating, humans), "humans": len(humans)}
    return metrics


def read_contest(path: Path) -> Contest:
    """`ID.standings.json` and the `ID.ratings.json` beside it; the unrated are left out.

    Raises:
        UserError: a file is missing or not what the API answers.
    """
    changes_path = path.with_name(path.name.replace(".standings.", ".ratings."))
    standings, changes = _result(path), _result(changes_path)
    try:
        before = {change["handle"]: change["oldRating"] for change in changes}
        points = {p["index"]: p.get("points") for p in standings["problems"]}
        rows = [
            (row["points"], row["penalty"], before[handle])
            for row in standings["rows"]
            if (handle := row["party"]["members"][0]["handle"]) in before
        ]
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{path} and {changes_path.name} are not what contest.standings and "
            f"contest.ratingChanges answer (no {error}): save the answers as they are"
        ) from error
    if not rows:
        raise UserError(f"{path}: no participant has a rating in {changes_path.name}")
    return Contest(points, rows)


def read_ratings(path: Path) -> list[float]:
    """Human ratings: the API's `user.ratedList`, or a list of numbers."""
    users = _result(path)
    try:
        return [float(user["rating"] if isinstance(user, dict) else user) for user in users]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is neither user.ratedList nor a list of numbers") from error


def _result(path: Path) -> object:
    """The API's answer without its envelope."""
    try:
        answer = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): save it anew") from error
    return answer["result"] if isinstance(answer, dict) and "result" in answer else answer

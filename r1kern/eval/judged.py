"""AlpacaEval-2- and Arena-Hard-style evaluation of stored answers against a baseline's.

DeepSeek-R1 (arXiv 2501.12948), section 3: only the final summary is judged "to avoid length bias".
We differ from both benchmarks: the wording put to the judge is ours (figures compare within this
program, not with their leaderboards), and each question is asked in both orders (AlpacaEval asks
one, drawn at random, and reads the token's probability; we count a tie as half).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from r1kern.config import JudgeConfig
from r1kern.data.records import Record, read_records
from r1kern.errors import UserError
from r1kern.eval.win_rate import agreement, arena_hard, interval, length_controlled
from r1kern.rewards.format import parts
from r1kern.rewards.judge import JudgeClient, Preference

OUTCOMES = {"a": 1.0, "tie": 0.5, "b": 0.0}
NOTED_SHARES = 10  # progress notes

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """A model's answer to one question; `summary` is "" where it never came to one."""

    id: str
    question: str
    summary: str


@dataclass(frozen=True)
class Pair:
    """The two answers to one question, the model's first."""

    id: str
    question: str
    summary: str
    baseline: str

    def key(self, judge: str) -> str:
        """Names the judgement; changes with anything it depends on."""
        told = json.dumps([judge, self.question, self.summary, self.baseline])
        return hashlib.sha256(told.encode()).hexdigest()


@dataclass(frozen=True)
class Judged:
    """The outcome over all questions; rates in [0, 1], each with its 95 % interval.

    Attributes:
        questions: judged ones.
        failures: questions without a judgement, for which the judge failed.
        win_rate: with ties as half; a question is won where both orders say so.
        arena_hard: score of that protocol, see `win_rate.arena_hard`.
        length_controlled: see `win_rate.length_controlled`.
        agreement: share of questions that both orders decide the same way.
        characters, baseline_characters: mean length of the judged summaries.
        unfinished, baseline_unfinished: answers without a summary, which lose unasked.
    """

    questions: int
    failures: int
    win_rate: float
    win_rate_interval: tuple[float, float]
    arena_hard: float
    arena_hard_interval: tuple[float, float]
    length_controlled: float
    length_controlled_interval: tuple[float, float]
    agreement: float
    characters: float
    baseline_characters: float
    unfinished: int
    baseline_unfinished: int

    def lines(self) -> str:
        """What a user reads."""
        rates = [
            (name, getattr(self, field), getattr(self, f"{field}_interval"))
            for name, field in (
                ("win rate", "win_rate"),
                ("length-controlled", "length_controlled"),
                ("Arena-Hard score", "arena_hard"),
            )
        ]
        text = "\n".join(
            f"{name:18s}{100 * rate:6.1f} %  [{100 * low:.1f}, {100 * high:.1f}]"
            for name, rate, (low, high) in rates
        )
        text += (
            f"\n{self.questions} questions, both orders agree on {100 * self.agreement:.0f} %, "
            f"{self.characters:.0f} characters an answer against {self.baseline_characters:.0f}, "
            f"{self.unfinished} without a summary against {self.baseline_unfinished}"
        )
        failed = f"\n{self.failures} not judged: run the command again to ask for them"
        return text + (failed if self.failures else "")


def read_answers(path: str | Path) -> list[Answer]:
    """Answers of one model, one a question.

    Records are those of `r1kern rollout` ("id", "question", "completion"), of AlpacaEval
    ("instruction", "output") or of Arena-Hard v0.1 ("question_id", "choices"; no question).

    Raises:
        UserError: a field is missing, or a question occurs twice.
    """
    answers = [_answer(record) for record in read_records(path)]
    seen: set[str] = set()
    for answer in answers:
        if answer.id in seen:
            raise UserError(
                f"{path}: question '{answer.id}' is answered twice: keep one (rollout --samples 1)"
            )
        seen.add(answer.id)
    return answers


def judge_answers(config: JudgeConfig, answers: Path, baseline: Path, out: Path) -> Judged:
    """Asks the judge for what `out` does not hold yet, and counts.

    Each judgement is appended to `out` as soon as it is made; a failed one is kept there to be
    looked at and asked for again by the next call.

    Raises:
        UserError: files that cannot be read or do not fit together, a judge that cannot be used,
            no judgement at all.
    """
    pairs = _pairs(answers, baseline)
    keys = [pair.key(config.judge.model) for pair in pairs]
    with _opened(out) as file:
        made = _read_judgements(out, file)
        missing = [(k, p) for k, p in zip(keys, pairs, strict=True) if made.get(k) is None]
        for key, pair, preference in _ask(config, missing):
            made[key] = preference
            _append(file, key, pair, preference)
    return _count(config, pairs, [made[key] for key in keys], out)


def _answer(record: Record) -> Answer:
    if "completion" in record.values:
        text = record.values["completion"]
        named = record.scalar("id"), record.text("question")
    elif "output" in record.values:
        text = record.values["output"]
        named = record.text("instruction"), record.text("instruction")
    else:
        choices = record.items("choices")
        try:
            text = choices[0]["turns"][0]["content"]
        except (KeyError, IndexError, TypeError):
            text = None
        named = record.scalar("question_id"), ""
    if not isinstance(text, str):
        raise UserError(f"{record.at}: the answer must be text: correct or remove the record")
    return Answer(*named, parts(text).summary)


def _pairs(answers: Path, baseline: Path) -> list[Pair]:
    ours, theirs = read_answers(answers), read_answers(baseline)
    by_id = {answer.id: answer for answer in theirs}
    by_question = {answer.question: answer for answer in theirs if answer.question}
    pairs, missing = [], []
    for answer in ours:
        other = by_id.get(answer.id) or by_question.get(answer.question)
        question = answer.question or (other.question if other else "")
        if other is None:
            missing.append(answer.id)
        elif not question:
            raise UserError(
                f"neither {answers} nor {baseline} has the text of question '{answer.id}': "
                "add a field 'question'"
            )
        else:
            pairs.append(Pair(answer.id, question, answer.summary, other.summary))
    if missing:
        raise UserError(
            f"{baseline} does not answer {len(missing)} of the {len(ours)} questions of {answers}, "
            f"such as '{missing[0]}': answer them, or leave them out"
        )
    return pairs


def _ask(
    config: JudgeConfig, missing: list[tuple[str, Pair]]
) -> Iterator[tuple[str, Pair, Preference]]:
    """Judgements as they come."""
    to_ask = []
    for key, pair in missing:
        if pair.summary and pair.baseline:
            to_ask.append((key, pair))
        else:
            yield key, pair, _without_judge(pair)
    if not to_ask:
        return
    with JudgeClient(config.judge) as client:
        client.check()
        futures = {
            client.submit_pair(pair.question, pair.summary, pair.baseline): (key, pair)
            for key, pair in to_ask
        }
        for done, future in enumerate(as_completed(futures), start=1):
            yield *futures[future], future.result()
            if done * NOTED_SHARES // len(futures) > (done - 1) * NOTED_SHARES // len(futures):
                _log.info("judged %d of %d", done, len(futures))


def _without_judge(pair: Pair) -> Preference:
    if pair.summary:
        return Preference("a", ("A>>B", "B>>A"))
    if pair.baseline:
        return Preference("b", ("B>>A", "A>>B"))
    return Preference("tie", ("A=B", "A=B"))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor to append to, held by one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file
    except BlockingIOError:
        raise UserError(f"{path} is being written by another r1kern judge: let it end") from None
    finally:
        os.close(file)


def _read_judgements(path: Path, file: int) -> dict[str, Preference]:
    """What the file holds; a last line that a kill cut short is taken off."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.ftruncate(file, len(whole))
    made = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            fields = record["winner"], tuple(record["labels"]), tuple(record["explanations"])
            key = record["key"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number} is no judgement of r1kern judge: name another file with --out"
            ) from error
        if record["failure"] is None:
            made[key] = Preference(*fields)
    return made


def _append(file: int, key: str, pair: Pair, preference: Preference) -> None:
    record = {"key": key, "id": pair.id, **asdict(preference)}
    line = json.dumps(record).encode() + b"\n"
    try:
        written = os.write(file, line)
    except OSError as error:
        raise UserError(f"a judgement cannot be stored: {error}: make room and go on") from error
    if written != len(line):  # the next call takes the part off
        raise UserError(f"the disk took {written} of {len(line)} bytes of a judgement: make room")


def _count(
    config: JudgeConfig, pairs: list[Pair], preferences: list[Preference], out: Path
) -> Judged:
    judged = [(p, q) for p, q in zip(pairs, preferences, strict=True) if q.failure is None]
    if not judged:
        raise UserError(
            f"none of {len(pairs)} questions was judged ({preferences[0].failure}): mend that and "
            f"run the command again; see {out}"
        )
    outcomes = np.array([OUTCOMES[q.winner] for _, q in judged])
    points, weights = arena_hard([q.labels for _, q in judged])
    ours = np.array([len(p.summary) for p, _ in judged])
    theirs = np.array([len(p.baseline) for p, _ in judged])
    statistics = {
        "win_rate": lambda i: outcomes[i].mean(),
        "arena_hard": lambda i: points[i].sum() / weights[i].sum(),
        "length_controlled": lambda i: length_controlled(outcomes[i], ours[i], theirs[i]),
    }
    every = np.arange(len(judged))
    rounds, seed = config.bootstrap_rounds, config.seed
    figures = {name: float(statistic(every)) for name, statistic in statistics.items()}
    intervals = {
        f"{name}_interval": interval(len(judged), statistic, rounds=rounds, seed=seed)
        for name, statistic in statistics.items()
    }
    return Judged(
        questions=len(judged),
        failures=len(pairs) - len(judged),
        agreement=agreement([q.labels for _, q in judged]),
        characters=float(ours.mean()),
        baseline_characters=float(theirs.mean()),
        unfinished=int((ours == 0).sum()),
        baseline_unfinished=int((theirs == 0).sum()),
        **figures,
        **intervals,
    )

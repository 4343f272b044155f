import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1kern.errors import UserError
from r1kern.rewards.format import TAGS, format_reward
from r1kern.rewards.math import MathGrader
from r1kern.rewards.score import score_rollouts
from r1kern.types import Completion, Prompt, Rollout

BOMB = r"$\prod_{k=1}^{1000000} k!$"


@pytest.fixture(scope="module")
def grader():
    grader = MathGrader()
    yield grader
    grader.close()


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think> 8+4=12 </think> <answer> 72 </answer>", 1.0),
        ("<think></think><answer>72</answer>", 1.0),
        ("\n<think>a\nb</think>\n\n<answer>72</answer>\n", 1.0),
        ("<think> a < b </think> <answer> {} </answer>", 1.0),
        ("<think> </think> <answer> </answer>", 0.0),
        ("<answer> 72 </answer> <think> a </think>", 0.0),
        ("<think> a </think> <answer> 72 </answer> .", 0.0),
        ("so <think> a </think> <answer> 72 </answer>", 0.0),
        ("<think> a </think> so <answer> 72 </answer>", 0.0),
        ("<think> a </think> <answer> 72", 0.0),
        ("<think> a <answer> 72 </answer> </think>", 0.0),
        ("<think> a <answer> 72 </think> </answer>", 0.0),
        ("<THINK> a </THINK> <answer> 72 </answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format(completion, reward):
    assert format_reward(completion) == reward


bodies = st.text(max_size=30).filter(lambda text: not any(tag in text for tag in TAGS))
blanks = st.text(" \n\t", max_size=3)


@given(bodies, bodies.filter(str.strip), blanks, blanks, blanks, st.data())
def test_format_allows_each_tag_once_and_nothing_outside(think, answer, a, b, c, data):
    good = f"{a}<think>{think}</think>{b}<answer>{answer}</answer>{c}"
    assert format_reward(good) == 1.0
    at = data.draw(st.integers(0, len(good)))
    tag = data.draw(st.sampled_from(TAGS))
    assert format_reward(good[:at] + tag + good[at:]) == 0.0
    assert format_reward(good.replace(tag, "")) == 0.0
    outside = data.draw(st.sampled_from([0, len(a), len(good) - len(c), len(good)]))
    assert format_reward(good[:outside] + "x" + good[outside:]) == 0.0


def rollout(answer, *texts):
    prompt = Prompt(id="p", ids=(1,), answer=answer, text="?")
    samples = tuple(Completion(ids=(2,), logps=(0.0,), text=t, finish="stop") for t in texts)
    return Rollout(prompt=prompt, completions=samples, weight_version=3)


RIGHT = "<think> </think> <answer> 72 </answer>"
WRONG = "<think> </think> <answer> 71 </answer>"


def test_scores_keep_each_term_and_their_weighted_sum():
    scored = score_rollouts(
        [rollout("72", RIGHT, WRONG, "72", "71"), rollout("71", RIGHT)],
        {"accuracy": 1.0, "format": 0.1},
    )
    terms = [score.terms for one in scored for score in one.scores]
    assert [(t["accuracy"], t["format"]) for t in terms] == [(1, 1), (0, 1), (1, 0), (0, 0), (0, 1)]
    totals = [score.total for one in scored for score in one.scores]
    assert totals == pytest.approx([1.1, 0.1, 1.0, 0.0, 0.1])
    assert [len(one.scores) for one in scored] == [4, 1]
    assert scored[0].weight_version == 3
    assert all(score.failure is None for one in scored for score in one.scores)


def test_only_the_terms_with_a_weight_are_computed():
    (scored,) = score_rollouts([rollout("72", BOMB)], {"format": 2.0})
    assert scored.scores[0].terms == {"format": 0.0}


def test_failures_are_named_and_leave_their_term_out(grader):
    def moody(completion, prompt):
        return {RIGHT: 0.5, "72": math.nan}[completion.text]

    (scored,) = score_rollouts(
        [rollout("72", RIGHT, "72", BOMB)],
        {"accuracy": 1.0, "moody": 2.0},
        extra={"moody": moody, "unused": moody},
        grader=grader,
    )
    good, nan, bomb = scored.scores
    assert (good.total, good.failure) == (2.0, None)
    assert nan.terms == {"accuracy": 1.0}
    assert (nan.total, nan.failure) == (0.0, "moody: returned nan")
    assert bomb.terms == {}
    assert bomb.failure.startswith("accuracy: deadline")
    assert "moody: KeyError" in bomb.failure


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"accuracy": 1.0, "fromat": 0.1}, "unknown reward term 'fromat': did you mean 'format'"),
        ({}, "no reward terms"),
        ({"accuracy": math.nan}, "'accuracy' is nan"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        score_rollouts([rollout("72", RIGHT)], weights)

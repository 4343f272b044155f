"""Records to tokenised prompts (GRPO, evaluation), training pairs (SFT), preferences."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from r1kern.data.reading import Preference, Reading
from r1kern.data.records import Record, read_records
from r1kern.data.template import render
from r1kern.errors import UserError
from r1kern.types import TASKS, Prompt, Sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
Overlong = Literal["error", "drop"]


def load_prompts(
    source: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_prompt_tokens: int,
    overlong: Overlong = "error",
    problem_field: str = "problem",
    answer_field: str = "answer",
    id_field: str = "id",
    where: Mapping[str, Iterable] | None = None,
) -> list[Prompt]:
    """Problems with their answers, rendered and tokenised, in the source's order.

    A record may name its `task` (see `types.Prompt`; "math" where it does not), its `language` and,
    for programs, a list of `tests`. Only tasks with an answer to compare with need one.

    Args:
        source, where: as in `read_records`.
        template: as in `render`.
        max_prompt_tokens: budget of a rendered prompt.
        overlong: what to do with a longer one; dropped ones are counted in a logged warning.
        id_field: field of the record's unique name; where a record has none, its place is its name.

    Raises:
        UserError: bad source or record, two records of one id, or a prompt over the budget.
    """
    records = read_records(source, where=where)
    names = _unique_names(records, id_field)
    texts, ids = _tokenise(records, problem_field, template, tokenizer)
    prompts = [
        Prompt(name, tuple(row), text=text, **_task(record, problem_field, answer_field))
        for record, name, row, text in zip(records, names, ids, texts, strict=True)
    ]
    sizes = [len(prompt.ids) for prompt in prompts]
    return _within(prompts, sizes, names, records, max_prompt_tokens, overlong, "prompt")


def _task(record: Record, problem_field: str, answer_field: str) -> dict:
    """The fields of a prompt that say how it is judged."""
    task = record.text("task") if "task" in record.values else "math"
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.0)[0]
        raise UserError(f"{record.at}: unknown task '{task}': did you mean '{near}'?")
    has_answer = task in ("math", "choice", "reference")
    return dict(
        question=record.text(problem_field),
        answer=record.scalar(answer_field) if has_answer else "",
        task=task,
        language=record.text("language") if "language" in record.values else "",
        tests=tuple(map(json.dumps, record.items("tests"))) if task == "code" else (),
    )


def load_pairs(
    source: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_tokens: int,
    overlong: Overlong = "error",
    problem_field: str = "problem",
    completion_field: str = "completion",
    id_field: str = "id",
    where: Mapping[str, Iterable] | None = None,
) -> list[Sequence]:
    """(prompt, completion) pairs for SFT, the end-of-sequence token appended to each completion.

    Prompt and completion are tokenised apart, so that training sees the boundary that generation
    sees. Arguments and errors as in `load_prompts`; `max_tokens` is the budget of prompt and
    completion together.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token: set its eos_token")
    records = read_records(source, where=where)
    names = _unique_names(records, id_field)
    _, prompt_ids = _tokenise(records, problem_field, template, tokenizer)
    completions = [record.text(completion_field) for record in records]
    completion_ids = tokenizer(completions, add_special_tokens=False)["input_ids"]
    pairs = [
        Sequence(prompt_ids=tuple(p), completion_ids=(*c, tokenizer.eos_token_id))
        for p, c in zip(prompt_ids, completion_ids, strict=True)
    ]
    sizes = [len(pair.prompt_ids) + len(pair.completion_ids) for pair in pairs]
    return _within(pairs, sizes, names, records, max_tokens, overlong, "pair")


def load_preferences(
    source: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    max_tokens: int,
    max_pair_tokens: int,
    overlong: Overlong = "error",
    where: Mapping[str, Iterable] | None = None,
) -> list[Preference]:
    """Records with `problem`, `chosen` and `rejected` for a reward model, in the source's order.

    Errors as in `load_prompts`.

    Args:
        source, where: as in `read_records`.
        max_tokens: budget of a problem with one response.
        max_pair_tokens: budget of a pair, problem twice, which one micro-batch must hold.
        overlong: what to do with a longer one; dropped ones are counted in a logged warning.
    """
    records = read_records(source, where=where)
    names = _unique_names(records, "id")
    problems = [record.text("problem") for record in records]
    chosen, rejected = (
        reading.sequences([(r.text("problem"), r.text(field)) for r in records], tokenizer)
        for field in ("chosen", "rejected")
    )
    pairs = list(map(Preference, problems, chosen, rejected))
    longest = [max(len(p.chosen), len(p.rejected)) for p in pairs]
    rows = list(zip(pairs, names, records, strict=True))
    rows = _within(rows, longest, names, records, max_tokens, overlong, "response")
    pairs, names, records = map(list, zip(*rows, strict=True))
    sizes = [len(pair) for pair in pairs]
    return _within(pairs, sizes, names, records, max_pair_tokens, overlong, "pair")


def _tokenise(
    records: list[Record],
    problem_field: str,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[str], list[list[int]]]:
    texts = [render(template, record.text(problem_field), tokenizer) for record in records]
    # A chat template writes its own begin-of-sequence token.
    ids = tokenizer(texts, add_special_tokens=template != "chat")["input_ids"]
    return texts, ids


def _unique_names(records: list[Record], id_field: str) -> list[str]:
    places: dict[str, str] = {}
    for record in records:
        name = record.scalar(id_field) if id_field in record.values else record.at
        if name in places:
            raise UserError(f"{record.at}: id '{name}' is taken by {places[name]}: make ids unique")
        places[name] = record.at
    return list(places)


def _within(
    items: list,
    sizes: list[int],
    names: list[str],
    records: list[Record],
    budget: int,
    overlong: Overlong,
    what: str,
) -> list:
    if overlong not in ("error", "drop"):
        raise UserError(f"overlong must be 'error' or 'drop', not '{overlong}'")
    over = [i for i, size in enumerate(sizes) if size > budget]
    if over and (overlong == "error" or len(over) == len(items)):
        first = over[0]
        raise UserError(
            f"{records[first].at}: {what} '{names[first]}' has {sizes[first]} tokens, the budget "
            f"is {budget} ({len(over)} of {len(items)} are over): raise the budget or shorten it"
            + (", or drop such records (overlong: drop)" if overlong == "error" else "")
        )
    if over:
        _log.warning("dropped %d of %d %ss over %d tokens", len(over), len(items), what, budget)
    return [item for item, size in zip(items, sizes, strict=True) if size <= budget]

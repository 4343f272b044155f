"""The demo's stand-in for what a user brings: a base model, a student, general data, examples.

Both models are tiny and made here from nothing: next-token prediction on `data.tiny_corpus`.
"""

from __future__ import annotations

from r1kern.data import tiny_corpus
from r1kern.data.records import read_records
from r1kern.data.tiny_model import DEEPSEEK, QWEN, write_model
from r1kern.data.tokenizer import build_demo_tokenizer
from r1kern.stages.actions import fine_tune, write_jsonl
from r1kern.stages.commands import merged
from r1kern.stages.pipeline import Context, Result, Stage
from r1kern.stages.settings import Settings

EXAMPLES = 50


def stage(settings: Settings) -> Stage:
    options = settings.config.tiny

    def run(context: Context) -> Result:
        problems = [r.text("problem") for r in read_records(context.inputs["problems"])]
        general = read_records("bundled:tiny_general")
        files = tiny_corpus.write_general(context.folder)
        corpus = list(
            tiny_corpus.base_documents(problems, general, visits=options.visits, seed=settings.seed)
        )
        data = write_jsonl(context.folder / "corpus.jsonl", corpus)
        examples = list(tiny_corpus.examples(problems, EXAMPLES, seed=settings.seed))
        files["examples"] = write_jsonl(context.folder / "examples.jsonl", examples)
        tokenizer = build_demo_tokenizer(tiny_corpus.WORDS)
        tokenizer.chat_template = tiny_corpus.CHAT_TEMPLATE
        for name, kind, steps in (
            ("model", DEEPSEEK, options.steps),
            ("student", QWEN, options.student_steps),
        ):
            at = Context(context.folder / name, context.inputs, context.commands)
            at.folder.mkdir(exist_ok=True)
            untrained = write_model(at.folder / "untrained", kind, tokenizer)
            tree = merged(
                settings.sft({}),
                {"model": {"init": "random"}, "data": {"template": "none"}},
                {"train": {"steps": steps}},
                options.sft,
            )
            files[name] = fine_tune(at, tree, model=untrained, data=data)
        counts = {"corpus": len(corpus), "problems": len(problems)}
        return Result(files, counts, run=context.folder / "model")

    recorded = settings.recorded(options)
    return Stage("tiny", run, {"problems": "data.reasoning"}, recorded, kind="sft")

"""Stage 6, section 2.4: fine-tuning of dense students on stage 4's data, no reinforcement learning.

With `rl` a student is also trained by reinforcement learning directly, the comparison of the
paper's section 4.1.
"""

from __future__ import annotations

from r1kern.config.pipeline import Student
from r1kern.stages.actions import accuracy_of_run, fine_tune, reinforce
from r1kern.stages.commands import merged
from r1kern.stages.pipeline import Context, Result, Stage
from r1kern.stages.settings import Settings


def stage(settings: Settings) -> Stage:
    students = settings.config.students
    inputs = {"data": "rejection.data", "problems": "data.reasoning", "eval": "data.eval"}
    for name, student in students.items():
        inputs[f"student: {name}"] = student.path or "tiny.student"

    def run(context: Context) -> Result:
        outputs, accuracies, last = {}, {}, None
        for name, student in students.items():
            inner = Context(context.folder / name, context.inputs, context.commands)
            inner.folder.mkdir(exist_ok=True)
            made, measured = _student(inner, name, student, settings)
            outputs |= made
            accuracies |= measured
            last = inner.folder / "sft"
        return Result(outputs, accuracy=accuracies, run=last)

    recorded = settings.recorded({n: s.model_dump(mode="json") for n, s in students.items()})
    return Stage("distil", run, inputs, recorded, kind="sft")


def _student(
    context: Context, name: str, student: Student, settings: Settings
) -> tuple[dict, dict]:
    """The student's models and their accuracies."""
    source = context.inputs[f"student: {name}"]
    at = Context(context.folder / "sft", context.inputs, context.commands)
    at.folder.mkdir(exist_ok=True)
    model = fine_tune(
        at,
        settings.sft(student.sft),
        model=source,
        data=context.inputs["data"],
        epochs=student.epochs,
    )
    outputs = {name: model}
    accuracies = {f"{name}, distilled": settings.measure(context, model, "distilled")}
    if student.rl is not None:
        alone = Context(context.folder / "rl", context.inputs, context.commands)
        alone.folder.mkdir(exist_ok=True)
        paths = {"train": str(context.inputs["problems"]), "eval": str(context.inputs["eval"])}
        tree = merged(settings.student_rl(student.rl), {"data": paths})
        outputs[f"{name}, RL only"] = reinforce(alone, tree, model=source)
        both = accuracy_of_run(alone.folder, context.inputs["eval"], settings.samples)
        accuracies |= {f"{name}, before": both["before"], f"{name}, RL only": both["after"]}
    return outputs, accuracies

"""A resumable chain of stages, with inputs, outputs, counts and lineage on record.

`pipeline.json` in the pipeline's folder says how each stage stands; it is replaced as a whole after
every change. A stage that is done is not done again; one that was interrupted is called again in
its folder and goes on from what it left there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from r1kern.errors import UserError
from r1kern.stages.commands import Commands

RECORD = "pipeline.json"


@dataclass(frozen=True)
class Result:
    """What a stage made.

    Attributes:
        outputs: files and folders by name; other stages take them as "stage.name".
        counts: how many of what went in and out.
        dropped: how many a filter left out, by reason.
        accuracy: measured accuracies by name, each with "pass@1", "half_interval" (95 %, both in
            [0, 1]), "problems", "samples".
        run: folder of the training run that the stage is, if it is one.
        notes: lines for the reader.
    """

    outputs: Mapping[str, Path]
    counts: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    accuracy: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    run: Path | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Context:
    """What a stage is given.

    Attributes:
        folder: its own, which exists; what an interrupted call left is still there.
        inputs: paths by the labels of `Stage.inputs`.
        commands: starts r1kern's commands under torchrun.
    """

    folder: Path
    inputs: Mapping[str, Path]
    commands: Commands


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline.

    Attributes:
        name: unique; also the stage's folder.
        run: does the work; called again after an interruption.
        inputs: by label, "stage.output" of an earlier stage or a path.
        options: JSON values that its result depends on; a changed one is noticed.
        kind: what it is, for the report: "sft", "train", "collect", "reward", ...
    """

    name: str
    run: Callable[[Context], Result]
    inputs: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    kind: str = "stage"


class Pipeline:
    """Stages in order, each once.

    Args:
        folder: everything is written here; one process at a time may use it.
        stages: in the order they run.
        commands: how commands are started; by default torchrun on this machine.

    Raises:
        UserError: two stages of one name, or an input that no earlier stage makes.
    """

    def __init__(
        self, folder: str | Path, stages: Sequence[Stage], *, commands: Commands | None = None
    ):
        self.folder, self.stages = Path(folder), list(stages)
        self._commands = commands or Commands()
        _check_names(self.stages)

    def run(self, *, redo: Sequence[str] = ()) -> list[dict]:
        """Run what is not done; returns the records of all stages.

        Args:
            redo: stages to forget, with all that follow from them; their folders are set aside.

        Raises:
            UserError: a stage was done with other options or inputs, or failed.
            Interrupted: by a signal; the same call goes on.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._forget(redo)
            for place, stage in enumerate(self.stages, 1):
                print(f"[{place}/{len(self.stages)}] {stage.name}", end=" ", flush=True)
                self._run_stage(stage)
        return self.records()

    def records(self) -> list[dict]:
        """One record a stage, in order; "state" is pending, running, failed or done."""
        known = {record["name"]: record for record in self._read()}
        return [
            known.get(s.name, {"name": s.name, "kind": s.kind, "state": "pending"})
            for s in self.stages
        ]

    def output(self, reference: str) -> Path:
        """The path behind "stage.output".

        Raises:
            UserError: that stage is not done, or has no such output.
        """
        name, _, label = reference.partition(".")
        record = next((r for r in self._read() if r["name"] == name), {})
        outputs = record.get("outputs", {}) if record.get("state") == "done" else {}
        if label not in outputs:
            raise UserError(
                f"stage '{name}' has no output '{label}' yet (it has {sorted(outputs)}): run it "
                "first, or correct the name"
            )
        return self.folder / outputs[label]

    # -- one stage ----------------------------------------------------------------------------

    def _run_stage(self, stage: Stage) -> None:
        inputs = {label: self._resolve(source) for label, source in stage.inputs.items()}
        fingerprint = self._fingerprint(stage, inputs)
        before = next((r for r in self._read() if r["name"] == stage.name), {})
        if before and before["fingerprint"] != fingerprint:
            raise UserError(
                f"stage '{stage.name}' in {self.folder} was begun with other options or inputs: "
                f"pass --redo {stage.name}, or use another folder"
            )
        if before.get("state") == "done" and self._outputs_exist(before):
            print(f"is done ({before['seconds']:.0f} s)", flush=True)
            return
        print(f"-> {self.folder / stage.name}", flush=True)
        folder = self.folder / stage.name
        folder.mkdir(exist_ok=True)
        record = {
            "name": stage.name,
            "kind": stage.kind,
            "state": "running",
            "fingerprint": fingerprint,
            "inputs": dict(stage.inputs),
            "options": dict(stage.options),
            "seconds": before.get("seconds", 0.0),
        }
        self._write(record)
        started = time.monotonic()
        try:
            result = stage.run(Context(folder, inputs, self._commands))
        except BaseException as error:
            state = "failed" if isinstance(error, Exception) else "running"
            seconds = record["seconds"] + time.monotonic() - started
            self._write({**record, "state": state, "seconds": seconds, "notes": [str(error)]})
            raise
        seconds = record["seconds"] + time.monotonic() - started
        self._write({**record, **self._described(result), "state": "done", "seconds": seconds})

    def _described(self, result: Result) -> dict:
        return {
            "outputs": {name: self._relative(path) for name, path in result.outputs.items()},
            "counts": dict(result.counts),
            "dropped": dict(result.dropped),
            "accuracy": {name: dict(found) for name, found in result.accuracy.items()},
            "run": self._relative(result.run) if result.run else None,
            "notes": list(result.notes),
        }

    def _relative(self, path: Path) -> str:
        path = Path(path)
        return str(path.relative_to(self.folder) if path.is_relative_to(self.folder) else path)

    def _resolve(self, source: str) -> Path:
        name = source.partition(".")[0]
        return self.output(source) if name in {s.name for s in self.stages} else Path(source)

    def _outputs_exist(self, record: dict) -> bool:
        return all((self.folder / path).exists() for path in record["outputs"].values())

    def _fingerprint(self, stage: Stage, inputs: Mapping[str, Path]) -> str:
        """Of the options, the inputs' makers, and files' contents where no stage made them."""
        made_by = {record["name"]: record["fingerprint"] for record in self._read()}
        sources = {}
        for label, source in stage.inputs.items():
            path = inputs[label]
            if (maker := source.partition(".")[0]) in made_by:
                sources[label] = made_by[maker]
            elif path.is_file():
                sources[label] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                sources[label] = source
        text = json.dumps([stage.options, sources], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # -- the record ---------------------------------------------------------------------------

    def _read(self) -> list[dict]:
        path = self.folder / RECORD
        return json.loads(path.read_text())["stages"] if path.is_file() else []

    def _write(self, record: dict) -> None:
        kept = {r["name"]: r for r in self._read()} | {record["name"]: record}
        self._store([kept[s.name] for s in self.stages if s.name in kept])

    def _store(self, records: list[dict]) -> None:
        path = self.folder / RECORD
        pending = [s for s in self.stages if s.name not in {r["name"] for r in records}]
        page = {
            "name": self.folder.name,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "stages": records,
            "pending": [s.name for s in pending],
        }
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(page, indent=1, ensure_ascii=False))
        scratch.rename(path)

    def _forget(self, redo: Sequence[str]) -> None:
        names = {stage.name for stage in self.stages}
        for name in redo:
            if name not in names:
                raise UserError(f"--redo {name}: no such stage; there are {sorted(names)}")
        gone = set(redo)
        for stage in self.stages:  # in order, so that what follows from a follower goes too
            if any(source.partition(".")[0] in gone for source in stage.inputs.values()):
                gone.add(stage.name)
        if not gone:
            return
        self._store([r for r in self._read() if r["name"] not in gone])
        for name in gone:
            folder = self.folder / name
            if folder.exists():
                folder.rename(folder.with_name(f"{name}.old-{int(time.time())}"))

    @contextmanager
    def _alone(self):
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another pipeline is running in {self.folder}: wait for it or use another "
                    "folder"
                ) from None
            yield


def _check_names(stages: Sequence[Stage]) -> None:
    names: set[str] = set()
    everything = {stage.name for stage in stages}
    for stage in stages:
        if stage.name in names:
            raise UserError(f"two stages are called '{stage.name}': rename one")
        for label, source in stage.inputs.items():
            maker = source.partition(".")[0]
            if maker in everything and maker not in names:
                raise UserError(
                    f"stage '{stage.name}' takes {label} from '{maker}', which comes later: move it"
                )
        names.add(stage.name)

"""Commands that evaluate."""

from __future__ import annotations

from pathlib import Path

from r1kern.cli.application import Config, Overrides, app


@app.command(name="eval")
def evaluate(config: Config, overrides: Overrides = None) -> None:
    """Run benchmarks under the paper's protocol; the same command again takes up what is there."""
    from r1kern import distributed
    from r1kern.config import EvalConfig, load_config
    from r1kern.eval.report import table
    from r1kern.eval.run import evaluate as run

    options = load_config(EvalConfig, config, overrides or [])
    results = run(options)
    if results is not None:
        print(table(results))
        folder = Path(options.run.folder)
        print(f"results: {folder / 'results.json'}, {folder / 'results.md'}")
    distributed.shutdown()

"""vLLM in the trainer's own processes: groups of completions, and audited weight updates."""

from r1kern.generate.engine import Generator, Sampling
from r1kern.generate.sleep import SleepReport
from r1kern.generate.sync import SyncError, SyncReport

__all__ = ["Generator", "Sampling", "SleepReport", "SyncError", "SyncReport"]

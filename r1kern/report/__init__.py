"""What a run tells: time by phase, metrics by step, progress."""

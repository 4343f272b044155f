"""Evaluation: pass@k, pass@1 over samples, majority vote."""

"""Rewards: rule-based terms of a completion and their weighted sum."""

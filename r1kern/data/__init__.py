"""Data sets, prompt templates, the demo's tokenizer and arithmetic problems."""

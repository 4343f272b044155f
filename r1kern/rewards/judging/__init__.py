"""Behind the judge: requests, cache, prompts and strict readings of the answers."""

"""Worker: `r1kern score` on the rollouts of ROOT with one model after the other.

python pooling.py ROOT MODEL ...
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from r1kern.scoring import score_file

if __name__ == "__main__":
    root = Path(sys.argv[1])
    for model in sys.argv[2:]:
        out = root / f"scored_{model}.jsonl"
        print(score_file(root / model, root / "rollouts.jsonl", out=out, reads="response"))
    sys.stdout.flush()
    os._exit(0)  # threads of vLLM would hold the process up

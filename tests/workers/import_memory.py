"""Worker: how far importing FOLDER rises above the model's own parameters, in bytes of memory.

python import_memory.py FOLDER

Prints the growth of the resident set's peak (mapped file pages count) and a sum of the weights.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from r1kern import distributed


def memory(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status)[1])


def main(folder: str) -> None:
    distributed.start()
    from r1kern.hf.config import read_hf_config
    from r1kern.hf.reader import HFReader
    from r1kern.model.gpt import build_model
    from r1kern.model.import_hf import import_weights
    from r1kern.model.megatron_config import to_megatron_config

    hf = read_hf_config(folder)
    config = to_megatron_config(
        hf, tp=1, ep=1, pp=1, dtype=torch.bfloat16, perform_initialization=False
    )
    model = build_model(config, vocab_size=hf.vocab_size, max_positions=128)
    for parameter in model.parameters():
        parameter.data.zero_()  # pages of untouched parameters are not in memory yet
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    import_weights(model, HFReader(folder, hf))
    peak = memory("VmHWM")
    untouched = sum(int((p == 0).all()) for p in model.parameters())
    print(f"growth={peak - before} untouched={untouched}")


if __name__ == "__main__":
    main(sys.argv[1])

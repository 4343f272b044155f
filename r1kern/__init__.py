"""r1kern: GRPO training of DeepSeek-V3-architecture models, one engine from laptop to cluster."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout (and an editable install) the kernels and the benchmarks live beside this package,
# in the top-level folders `kernels/` and `benchmarks/`; a wheel installs them as `r1kern/kernels`
# and `r1kern/benchmarks`.  Both import as `r1kern.kernels` and `r1kern.benchmarks`.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "kernels" / "reference.py").is_file() and (_checkout / "setup.py").is_file():
    __path__.append(str(_checkout))

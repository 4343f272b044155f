import numpy as np
from numpy.typing import NDArray

def pack_ffd(lengths: NDArray[np.integer], budget: int) -> NDArray[np.int64]: ...

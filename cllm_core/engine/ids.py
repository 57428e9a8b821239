"""Ids: tokens on the host."""

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
"""Token ids or positions, one-dimensional."""

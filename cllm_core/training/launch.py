"""The processes of a `torchrun` launch, told by its environment; a command run without it is the only process."""

import os


def rank() -> int:
    """Number of this process, 0 for the first."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))

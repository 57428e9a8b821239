"""How loading tells what it does."""

from collections.abc import Callable

OnProgress = Callable[[str, float], None]
"""Called with the stage in words and a fraction in 0..1."""

"""The console command `cllm`: commands, and options made from the settings."""

from .commands import app, main

__all__ = ["app", "main"]

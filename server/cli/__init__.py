"""The console command `cllm`: commands, and options made from the settings."""

from server.cli.commands import app, main

__all__ = ["app", "main"]

"""Servers compared over HTTP: the same prompts, the same load, in turns. Run it as `python -m benchmarks.served`."""

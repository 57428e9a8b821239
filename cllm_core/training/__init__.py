"""Training of Consistency LLMs: trajectories, packing, losses, trainer. Uses the engine; nothing below knows it."""

"""How models call functions: the formats of calls, reading them, forcing them, and telling a model of its functions."""

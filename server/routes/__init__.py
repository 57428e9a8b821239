"""The HTTP endpoints: each parses, calls once and shapes the answer."""

"""From requests to the engine to the deltas of choices; knows no endpoint and no body."""

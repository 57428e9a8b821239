"""For those who run the server: health, metrics, the engine's state in the log."""

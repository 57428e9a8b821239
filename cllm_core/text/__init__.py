"""Text on the torch-free side: chat templates, incremental detokenisation, stop strings."""

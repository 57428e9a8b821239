"""Writing a model for other programs: one set of weights, adapter merged, as a Hugging Face folder or a GGUF file."""

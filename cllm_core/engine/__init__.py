"""The Jacobi engine: scheduler, KV cache, model runner."""

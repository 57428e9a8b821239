"""/v1/models, and the endpoints that load and unload adapters."""

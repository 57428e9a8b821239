"""The worker process: the engine behind ZeroMQ, and the client that reaches it."""

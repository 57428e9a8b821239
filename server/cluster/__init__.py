"""The server on a Ray cluster: replicas of the whole app behind gateways (`cllm deploy`). Needs the extra `ray`."""

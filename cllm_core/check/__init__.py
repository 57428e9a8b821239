"""`cllm check`: whether a model is served right on this machine, and which path each of its parts takes."""

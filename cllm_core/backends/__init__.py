"""Backends: each prepares a loaded model for a kind of machine."""

"""Tests of cllm_core.tasks."""

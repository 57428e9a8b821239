"""Tests of cllm_core.training and its commands."""

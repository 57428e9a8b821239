"""Quality and speed of a CLLM beside its target model: tasks, decoding figures, trajectory pictures, reports."""

"""What the endpoints that generate have in common."""

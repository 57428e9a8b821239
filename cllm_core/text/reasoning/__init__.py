"""Models that reason before they answer: how they mark it, reading it, and grammars that wait for its end."""

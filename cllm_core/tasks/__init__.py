"""Data sets as training and evaluation read them: records, schemas and prompts. No torch in here."""

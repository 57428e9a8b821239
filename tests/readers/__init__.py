"""Programs of other makers read what is written here. They are slow and skipped where such a program is missing."""

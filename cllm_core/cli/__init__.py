"""What the console commands of all parts share; the commands themselves live beside what they run."""

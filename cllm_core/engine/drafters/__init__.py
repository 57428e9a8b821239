"""Where drafts come from: sources of one protocol, and the choice among them. A draft decides how many tokens a step
accepts, never which."""

"""The endpoints by OpenAI's names, a folder each: the request's body, what it plans, the answer's body."""

"""What every HTTP request passes, whatever it asks for: middleware, the body as JSON, errors as OpenAI's objects."""

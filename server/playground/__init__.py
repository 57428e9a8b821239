"""The playground: a page at `/` to try the served models in, without a build step or content of other hosts."""

"""Reading GGUF files: every key and tensor that changes what a model computes is used, or the file is refused.

`file` reads the format, `keys` hands out metadata and remembers what was asked for, `architectures` says how each
architecture of llama.cpp maps to one of transformers, `rope` and `weights` hold the parts that the architectures share,
`vocabulary` builds the tokenizer. `cllm_core.export` writes files by the same tables.
"""

"""What the kernels read (kernels.h, decoder.h), as ctypes lays it out. Addresses do not keep what they name alive."""

from ctypes import Structure, c_float, c_int64, c_void_p


class LinearRecord(Structure):
    """`linear` of kernels.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("panels", "bias")),
        *((name, c_int64) for name in ("num_in", "num_out", "is_int8")),
    )


class LayerRecord(Structure):
    """`decoder_layer`."""

    _fields_ = (
        *((name, LinearRecord) for name in ("qkv", "out", "gate_up", "down")),
        *((name, c_void_p) for name in ("input_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, c_int64) for name in ("num_heads", "num_kv_heads", "size", "window")),
        *((name, c_float) for name in ("input_epsilon", "mlp_epsilon", "query_epsilon", "key_epsilon", "scale")),
    )


class LowRankRecord(Structure):
    """`low_rank`."""

    _fields_ = (("down", LinearRecord), ("up", LinearRecord))


class AdapterLayerRecord(Structure):
    """`adapter_layer`."""

    _fields_ = tuple((name, LowRankRecord) for name in ("qkv", "out", "gate_up", "down"))


class AdaptedTokensRecord(Structure):
    """`adapted_tokens`."""

    _fields_ = (("layers", c_void_p), ("tokens", c_void_p), ("num_tokens", c_int64))


class StepRecord(Structure):
    """`decoder_step`."""

    _fields_ = (
        *((name, c_void_p) for name in ("rows", "block_ids", "slots", "keys", "values", "cos", "sin")),
        *((name, c_int64) for name in ("num_rows", "num_tokens", "block_size")),
        *(("adapted", c_void_p), ("adapted_places", c_void_p), ("num_adapters", c_int64)),
    )


class BuffersRecord(Structure):
    """`decoder_buffers`."""

    _fields_ = tuple(
        (name, c_void_p)
        for name in ("residual", "normed", "heads", "attended", "gated", "inputs", "own", "low", "own_inputs", "added")
    )


class DrawRecord(Structure):
    """`draw_call` of sampling.h."""

    _fields_ = (
        *(("logits", c_void_p), ("stride", c_int64), ("vocab_size", c_int64)),
        *((name, c_void_p) for name in ("positions", "keys", "temperature", "top_k", "top_p", "min_p")),
        *(("num_rows", c_int64), ("scratch", c_void_p), ("out", c_void_p)),
    )

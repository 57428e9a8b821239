"""One model on several devices of a machine: tensor parallelism.

Rank 0 is the worker itself, with scheduler, sampling and everything else; the other ranks are processes that compute
their part of each forward pass. Every rank loads and prepares the model in the same order, as each forward pass is one
of the whole group.
"""

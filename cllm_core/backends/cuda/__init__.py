"""What runs on CUDA devices only: Triton kernels over the paged cache, and steps replayed as CUDA graphs."""

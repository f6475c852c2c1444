"""The CUDA backend: Triton kernels for Ampere (sm_80) and Hopper (sm_90), and the ladder that checks them anywhere."""

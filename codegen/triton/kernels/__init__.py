"""GPU kernels in Triton's language: nothing but `tl`, each usable by the interpreter, the JIT and ahead of time.

Conventions: row-major tensors; `_ptr` arguments come first, then sizes, then compile-time constants in capitals.
Letters: M, N, K of a matrix product `C[M, N] = A[M, K] B[N, K]^T`; T tokens, D hidden size, E experts, I the
experts' inner size, H heads, R rows of the expert-sorted activations.
"""

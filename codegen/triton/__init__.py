"""GPU kernels: Triton sources, one specification for each, and their compilation ahead of time."""

"""q, k, v -> out: kernels, features, one contraction, mechanisms."""

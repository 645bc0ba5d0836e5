"""Memory and time of training steps, measured against the alternatives. Run ``python -m benchmarks.memory --help``."""

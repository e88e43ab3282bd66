"""What moves the weights: decay groups by role, the optimizer, the learning-rate schedule."""

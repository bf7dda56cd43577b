"""Real CUDA tensors against torch's own copy_ and fill_ on the same GPU, bit for bit."""

"""The ground floor: what a device can run, and how kernels are launched on it. Knows torch and Triton only."""

"""What stands in on a CPU for kernels that SGLang has for GPUs alone, and the platform."""

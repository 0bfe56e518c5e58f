"""What a forward runs: the forward itself, its kernels, quantized layers and routers."""

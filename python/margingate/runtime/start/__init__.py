"""Which options, which refusals, which patches in which process."""

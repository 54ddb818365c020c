"""What the kernel says: spectrum, closed forms, bounds. Knows arrays and kernels only."""

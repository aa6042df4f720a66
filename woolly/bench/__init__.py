"""python -m woolly.bench: what a machine can do, what kernels, layers and models make of it, where time goes."""

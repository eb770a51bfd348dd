"""Training: batches straight from archives, losses, optimisers, and runs that resume to the same weights."""

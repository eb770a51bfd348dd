"""Open-MAGVIT2: images to tokens without a codebook, and back."""

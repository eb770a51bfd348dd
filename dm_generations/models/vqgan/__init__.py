"""VQGAN, of vqgan-jax, taming-transformers and their descendants."""

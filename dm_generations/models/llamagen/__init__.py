"""LlamaGen: images of classes or of captions, and its codec."""

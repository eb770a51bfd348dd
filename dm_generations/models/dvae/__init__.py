"""Discrete VAEs: DALLE-pytorch's own and OpenAI's."""

"""From prompts to token ids. Never imports JAX."""

from dm_generations.text.tokenizer import PromptTokenizer as PromptTokenizer

"""From logits to tokens: settings, random keys, filters and the compiled loop."""

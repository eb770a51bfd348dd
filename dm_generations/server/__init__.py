"""The page over HTTP, with images that are decoded when they are looked at."""

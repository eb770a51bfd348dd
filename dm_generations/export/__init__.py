"""Images of an archive as files: what to write, encoding, writing, and the page that shows them."""

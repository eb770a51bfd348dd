"""From rows of an archive to picture files: rows, batches, pixels, files."""

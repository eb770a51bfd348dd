"""The sample browser: what `samplebrowser.html` reads, and the copy of the page beside the pictures."""

"""Other packages' interfaces, for programs that were written for them."""

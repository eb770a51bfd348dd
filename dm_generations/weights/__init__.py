"""File formats of weights and the files around them. No module here knows a model."""

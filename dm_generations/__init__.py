"""An archive of text-to-image generations, and the pipeline around it."""

__version__ = "0.1.0"

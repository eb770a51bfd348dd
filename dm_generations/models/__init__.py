"""The networks: a config in, a pure function out. No input or output but in `checkpoints`."""

"""The Python API, for programs and notebooks: `Archive` and `Generator`, whose images know prompt and settings."""

"""What the commands do, as functions that Python code can call too."""

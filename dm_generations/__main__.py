"""`python -m dm_generations`."""

from dm_generations.cli import program

if __name__ == "__main__":
    program()

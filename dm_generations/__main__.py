"""`python -m dm_generations`."""

from typing import NoReturn

from dm_generations.errors import handle_sigint


def start(argv: list[str] | None = None) -> NoReturn:
    """Run the command line. Ctrl-C is handled from here on, also while its modules are imported."""
    handle_sigint()
    from dm_generations.cli import program

    program(argv)


if __name__ == "__main__":
    start()

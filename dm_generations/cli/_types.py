"""Types of flags that more than one command has, for argparse."""

import argparse


def at_least_one(text: str) -> int:
    """Raises ArgumentTypeError for a number below 1, ValueError for what is no whole number."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


at_least_one.__name__ = "whole number"  # as argparse names it when int() fails

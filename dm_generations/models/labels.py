"""Names of the classes that a model draws."""

from pathlib import Path

IMAGENET_LABELS = Path(__file__).with_name("imagenet_labels.txt")  # a line for each class, in the order of the numbers
_IMAGENET_COUNT = 1000


def class_vocabulary(count: int) -> tuple[str, list[str]]:
    """Return name and labels of the vocabulary of a model's classes.

    No file of a model names them. Those of 1,000 classes are ImageNet's; others have their numbers as labels.

    Args:
        count: How many classes the model draws.
    """
    if count == _IMAGENET_COUNT:
        return "imagenet-1k", IMAGENET_LABELS.read_text(encoding="utf-8").splitlines()
    return f"classes-{count}", [str(label) for label in range(count)]

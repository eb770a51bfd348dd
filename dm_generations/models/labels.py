"""Names of the classes that a model draws."""


def class_vocabulary(count: int) -> tuple[str, list[str]]:
    """Return name and labels of the vocabulary of a model's classes.

    Args:
        count: How many classes it draws; a model of 1,000 draws those of ImageNet.
    """
    return ("imagenet-1k" if count == 1000 else f"classes-{count}"), [str(label) for label in range(count)]

"""Parses config arguments: --config=configs/FILE.py:WORD,WORD."""

from collections.abc import Sequence

DATASETS = ("cifar10", "cifar100")


def choose(file: str, argument: str, *groups: Sequence[str]) -> list[str]:
    """Returns one word of each group; the first of a group is the default.

    Args:
      file: name of the config file, for error messages.
      argument: comma-separated words in any order; may be empty.
      groups: groups of mutually exclusive words.

    Raises:
      ValueError: a word is in no group, or two are in the same one.
    """
    given = [word.strip() for word in argument.split(",") if word.strip()]
    known = " and ".join(f"one of {', '.join(group)}" for group in groups)
    example = f"configs/{file}:{','.join(group[-1] for group in groups)}"
    take = f"use {known}, such as {example}."
    for word in given:
        if not any(word in group for group in groups):
            raise ValueError(f"configs/{file} has no {word!r}; {take}")
    chosen = []
    for group in groups:
        words = [word for word in given if word in group]
        if len(words) > 1:
            raise ValueError(
                f"configs/{file} cannot be {' and '.join(words)}; {take}"
            )
        chosen.append(words[0] if words else group[0])
    return chosen

"""What other libraries say: kept off stderr, and of their errors one sentence.

quiet   () -> a context in which they say nothing          first_sentence   text -> its first line, or two
"""

from __future__ import annotations

import logging as python
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, logs and progress bars of the libraries, which no user can act on; errors are raised as ever."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    silent = python.root.manager.disable
    python.disable(max(silent, python.WARNING))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        python.disable(silent)
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def first_sentence(text: str) -> str:
    """The first line, with the next where the first only announces it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])

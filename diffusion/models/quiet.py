"""Parts of a folder are loaded and written in moments: no bar counts them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec

LIBRARIES = ("diffusers", "transformers")


@contextmanager
def without_bars() -> Iterator[None]:
    """The libraries show none in here; afterwards they do if they did before."""
    with ExitStack() as stack:
        for library in filter(find_spec, LIBRARIES):  # folders without texts need no transformers
            logging = import_module(f"{library}.utils.logging")
            if logging.is_progress_bar_enabled():
                logging.disable_progress_bar()
                stack.callback(logging.enable_progress_bar)
        yield

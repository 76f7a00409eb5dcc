"""What a command says while it works: on stderr, and only to somebody who looks."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from tqdm import tqdm
from transformers.utils import logging as hf_logging


@contextlib.contextmanager
def manners(debug: bool = False, in_options: Callable[[str], str] = str) -> Iterator[bool]:
    """Keep stdout for the result, and stderr quiet where nobody looks.

    Nothing that is printed in the block reaches stdout. Bars, the package's own log and what libraries print are shown
    on a terminal; in a pipe only warnings are. With `debug`, all is shown. The settings are put back at the end.

    Args:
        debug: Show all.
        in_options: Says a warning in terms of the command line.

    Yields:
        Whether to show bars.
    """
    seen = sys.stderr.isatty()
    ours, handler = logging.getLogger("remos_hf"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    level, propagates, verbosity = ours.level, ours.propagate, hf_logging.get_verbosity()
    bars = not datasets.are_progress_bars_disabled(), hf_logging.is_progress_bar_enabled()
    as_asked = tqdm.__init__
    ours.addHandler(handler)
    ours.setLevel(logging.INFO if seen or debug else logging.WARNING)
    ours.propagate = False
    try:
        with (
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stdout(sys.stderr if seen or debug else nowhere),
            warnings.catch_warnings(),
        ):
            if not debug:
                hf_logging.set_verbosity_error()
                warnings.showwarning = partial(_shown, in_options)
            if not seen:
                datasets.disable_progress_bars()
                hf_logging.disable_progress_bar()
                tqdm.__init__ = _without_bar(as_asked)
            yield seen
    finally:
        tqdm.__init__ = as_asked
        ours.removeHandler(handler)
        ours.setLevel(level)
        ours.propagate = propagates
        hf_logging.set_verbosity(verbosity)
        if bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            hf_logging.enable_progress_bar()


def _without_bar(as_asked: Callable[..., None]) -> Callable[..., None]:
    # tqdm has no switch for all its bars, and a strategy shows those of its profile whoever runs it.
    def hidden(bar: tqdm, *args: Any, **options: Any) -> None:  # noqa: ANN401 - tqdm's own
        as_asked(bar, *args, **{**options, "disable": True})

    return hidden


def _shown(
    in_options: Callable[[str], str], message: Warning | str, category: type[Warning], filename: str, *_: object
) -> None:
    # What libraries tell their callers is nothing that whoever types a command could act on.
    if category is UserWarning and ("remos_hf" in filename or "remos_hf" in str(message)):
        sys.stderr.write(f"Warning: {in_options(str(message))}\n")

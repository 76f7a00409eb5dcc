"""What a command says while it works, on stderr: bars to somebody who looks, a line a minute into a log."""

import contextlib
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from tqdm import tqdm
from transformers.utils import logging as hf_logging

from remos_hf.auditing.progress import minutes_told

# By which a warning of ours says whose it is where many libraries warn.
_OURS = " (remos_hf)"
_SECONDS_BETWEEN = 60.0
_last_told = 0.0  # seconds of the clock, since several bars and callbacks share the one line a minute


def tell(text: str) -> None:
    """Say a line, with the time of day."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def tell_now_and_then(text: Callable[[], str]) -> None:
    """Say how far something is, unless something of this kind was said less than a minute ago.

    Args:
        text: Makes the line; called only when it is said.
    """
    global _last_told
    now = time.monotonic()
    if now - _last_told >= _SECONDS_BETWEEN:
        _last_told = now
        tell(text())


@contextlib.contextmanager
def manners(debug: bool = False, in_options: Callable[[str], str] = str) -> Iterator[bool]:
    """Keep stdout for the result, and stderr quiet where nobody looks.

    Nothing that is printed in the block reaches stdout. Bars, the package's own log and what libraries print are shown
    on a terminal. In a pipe or a log only warnings are, and a line a minute that says how far the bars are. With
    `debug`, all is shown. The settings are put back at the end.

    Args:
        debug: Show all.
        in_options: Says a warning in terms of the command line.

    Yields:
        Whether somebody sees bars.
    """
    global _last_told
    seen = sys.stderr.isatty()
    ours, handler = logging.getLogger("remos_hf"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    level, propagates, verbosity = ours.level, ours.propagate, hf_logging.get_verbosity()
    bars = not datasets.are_progress_bars_disabled(), hf_logging.is_progress_bar_enabled()
    as_asked, shown, _last_told = tqdm.__init__, tqdm.display, time.monotonic()
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
                tqdm.__init__, tqdm.display = _unseen(as_asked), _as_line
            yield seen
    finally:
        tqdm.__init__, tqdm.display = as_asked, shown
        ours.removeHandler(handler)
        ours.setLevel(level)
        ours.propagate = propagates
        hf_logging.set_verbosity(verbosity)
        if bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            hf_logging.enable_progress_bar()


def _unseen(as_asked: Callable[..., None]) -> Callable[..., None]:
    # tqdm has no switch for all its bars, and a strategy shows those of its profile whoever runs it.
    def made(bar: tqdm, *args: Any, **options: Any) -> None:  # noqa: ANN401 - tqdm's own
        # tqdm leaves a bar out where its file is no terminal, if `disable` is None.
        as_asked(bar, *args, **{**options, "disable": bool(options.get("disable")), "file": _Nowhere(), "delay": 0})

    return made


class _Nowhere(io.StringIO):
    """Takes what a bar writes beside its line."""

    def write(self, text: str) -> int:
        return len(text)


def _as_line(bar: tqdm, msg: str | None = None, pos: int | None = None) -> bool:
    """Stand in for `tqdm.display`: say how far a bar is, now and then."""
    told = bar.format_dict
    if msg is None and told["initial"] < told["n"] != told["total"]:
        tell_now_and_then(lambda: _line_of(told))
    return True


def _line_of(told: Mapping[str, Any]) -> str:
    done, total, unit = told["n"], told["total"], told["unit"] if told["unit_scale"] else ""
    scaled = tqdm.format_sizeof if unit else lambda number: f"{number:,}"
    what = told["prefix"].removesuffix(": ") or "progress"
    if not total:
        return f"{what}: {scaled(done)}{unit}"
    left = told["elapsed"] * (total - done) / (done - told["initial"])
    return f"{what}: {scaled(done)}{unit} of {scaled(total)}{unit}; {minutes_told(left)}"


def _shown(
    in_options: Callable[[str], str], message: Warning | str, category: type[Warning], filename: str, *_: object
) -> None:
    # What libraries tell their callers is nothing that whoever types a command could act on.
    if category is UserWarning and ("remos_hf" in filename or "remos_hf" in str(message)):
        sys.stderr.write(f"Warning: {in_options(str(message).replace(_OURS, ''))}\n")

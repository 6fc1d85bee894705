# SPDX-License-Identifier: Apache-2.0
"""What the example scripts share: quiet libraries, help that reads as written, errors of one line."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import transformers
from accelerate import PartialState
from rich.console import Console
from rich.text import Text

from .errors import LLMD4RecError, RunInterrupted


def script_parser(doc: str) -> argparse.ArgumentParser:
    """An empty parser whose help begins with a script's docstring."""
    return argparse.ArgumentParser(
        description=doc.strip(), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def column_pair(text: str) -> tuple[str, str]:
    """`ours=theirs`, as options that name columns take it."""
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form OURS=THEIRS")
    return ours, theirs


def whole_number(text: str, least: int = 0) -> int:
    """A number of things, 0 among them."""
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {least} or more")
    return int(text)


def positive_number(text: str) -> int:
    """A number of things, one at least."""
    return whole_number(text, least=1)


def cut_off_list(text: str) -> tuple[int, ...]:
    """`5,10,20` as numbers."""
    return tuple(positive_number(word.strip()) for word in text.split(","))


def output_file(text: str) -> str:
    """A file to write when all is done. Whether it can be written is asked before."""
    folder = Path(text).parent
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(folder)!r} to write {text!r} to; make it first")
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, not a file to write")
    return text


@contextmanager
def one_line_errors() -> Iterator[None]:
    """
    Quiet libraries inside; an error that a user can mend becomes one line on stderr and exit code 1, a signal that a
    run was stopped by becomes one line and the exit code that shells give to it.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    except RunInterrupted as stop:
        if PartialState().is_main_process:
            Console(stderr=True).print(str(stop), soft_wrap=True, highlight=False)
        sys.exit(128 + stop.signal_number)
    except LLMD4RecError as error:
        # As a text: brackets in it are no markup.
        message = Text(" ".join(str(error).split()))
        Console(stderr=True).print("[red]error:[/red]", message, soft_wrap=True, highlight=False)
        sys.exit(1)

# SPDX-License-Identifier: Apache-2.0
"""What the pages need beyond mkdocs: formulas without scripts, links and types as docstrings write them."""

from __future__ import annotations

import html
import re
from functools import cache

from latex2mathml.converter import convert


# As arithmatex leaves them behind.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
REFERENCE = re.compile(r"\[<code>(~?)([\w.]+)</code>\]")
# A type as docstrings write it, in Markdown, which mkdocstrings takes for code; it also repeats the default.
TYPE = re.compile(r"<code>([^<]*[`*][^<]*)</code>(,\s*default:\s*<code>[^<]*</code>)?")


def on_page_content(content: str, page, config, files) -> str:
    """Formulas as MathML, which browsers draw themselves; names in brackets as links into the reference."""
    content = FORMULA.sub(_formula, content)
    content = TYPE.sub(_type, content) if page.url.startswith("reference/") else content
    return REFERENCE.sub(_reference, content)


def _formula(match: re.Match) -> str:
    display = "block" if match[2] == "[" else "inline"
    # The tail of a formula in a docstring can be indented; LaTeX does not mind line breaks.
    return convert(" ".join(html.unescape(match[3]).split()), display=display)


def _type(match: re.Match) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", match[1])
    return re.sub(r"\*(\w+)\*", r"<em>\1</em>", text)


def _reference(match: re.Match) -> str:
    short, name = match[1], match[2]
    shown = name.rsplit(".", 1)[-1] if short and not name.split(".")[0][0].isupper() else name
    identifier = _identifier(name)
    if identifier is None:
        return f"<code>{shown}</code>"
    return f'<autoref identifier="{identifier}" optional><code>{shown}</code></autoref>'


@cache
def _identifier(name: str) -> str | None:
    """Where the reference describes a name of this package; `None` for those of others."""
    import importlib

    from llmd4rec_hf import data, distillation, errors, evaluation, export, hub, models, training

    head, _, tail = name.removeprefix("llmd4rec_hf.").removeprefix("errors.").partition(".")
    package = importlib.import_module("llmd4rec_hf")
    for module in (package, data, models, distillation, evaluation, training, export, hub, errors):
        if head in getattr(module, "__all__", ()) or module in (export, hub, errors) and hasattr(module, head):
            return ".".join(filter(None, [module.__name__, head, tail]))
    return None

"""Typesets formulas of docstrings, which are written to be read as text.

Each is listed here with its TeX. One that a docstring no longer contains is a
warning, so that neither changes without the other.
"""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

_log = logging.getLogger(__name__)


class Block(str):
    """TeX of a formula that stands on a line of its own."""

    __slots__ = ()


_LAYER = Block(
    r"y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \varepsilon}}"
    r" \cdot \mathrm{scale} + \mathrm{bias}"
)
_CANCELS = r"\mathrm{E}[x^2] - \mathrm{E}[x]^2"

# Name -> text of the docstring -> TeX.
FORMULAS: dict[str, dict[str, str]] = {
    "jaxbn.batch_norm": {
        "var = m2 / count": r"\mathrm{var} = m_2 / \mathrm{count}",
        "xhat = (x - mean) / sqrt(var + epsilon) "
        "and y = xhat * scale + bias.": (
            Block(
                r"\hat{x} = \frac{x - \mathrm{mean}}"
                r"{\sqrt{\mathrm{var} + \varepsilon}}, \qquad"
                r" y = \hat{x} \cdot \mathrm{scale} + \mathrm{bias}."
            )
        ),
        "dxhat = (dx - E[dx] - xhat E[xhat dx]) / sqrt(var + epsilon).": Block(
            r"d\hat{x} = \frac{dx - \mathrm{E}[dx]"
            r" - \hat{x}\, \mathrm{E}[\hat{x}\, dx]}"
            r"{\sqrt{\mathrm{var} + \varepsilon}}."
        ),
    },
    "jaxbn.batch_renorm": {
        "y = (xhat r + d) * scale + bias,": Block(
            r"y = (\hat{x} r + d) \cdot \mathrm{scale} + \mathrm{bias},"
        ),
        "std = sqrt(var + epsilon)": (
            r"\mathrm{std} = \sqrt{\mathrm{var} + \varepsilon}"
        ),
        "r = clip(std_batch / std_running, 1 / r_max, r_max),": Block(
            r"r = \operatorname{clip}\left("
            r"\frac{\mathrm{std}_\mathrm{batch}}{\mathrm{std}_\mathrm{running}}"
            r", \frac{1}{r_\mathrm{max}}, r_\mathrm{max}\right),"
        ),
        "d = clip((mean_batch - mean_running) / std_running, -d_max, d_max).": (
            Block(
                r"d = \operatorname{clip}\left(\frac{\mathrm{mean}_\mathrm"
                r"{batch} - \mathrm{mean}_\mathrm{running}}"
                r"{\mathrm{std}_\mathrm{running}}"
                r", -d_\mathrm{max}, d_\mathrm{max}\right)."
            )
        ),
    },
    "jaxbn.normalize_weighted": {
        "mean' = (1 - a) mean + a mean_i": (
            r"\mathrm{mean}' = (1 - a)\, \mathrm{mean} + a\, \mathrm{mean}_i"
        ),
        "var' = (1 - a) var + a var_i + a (1 - a) |mean_i - mean|^2,": Block(
            r"\mathrm{var}' = (1 - a)\, \mathrm{var} + a\, \mathrm{var}_i"
            r" + a (1 - a) \lvert\mathrm{mean}_i - \mathrm{mean}\rvert^2,"
        ),
    },
    "jaxbn.moments": {
        "mean^2 > 16 var": r"\mathrm{mean}^2 > 16\, \mathrm{var}",
        "E[x^2] - E[x]^2": _CANCELS,
    },
    "jaxbn.merge": {
        "n = sum n_i": r"n = \sum_i n_i",
        "mean = sum n_i mean_i / n,": Block(
            r"\mathrm{mean} = \frac{1}{n} \sum_i n_i\, \mathrm{mean}_i,"
        ),
        "m2 = sum m2_i + n_i |mean_i - mean|^2.": Block(
            r"m_2 = \sum_i \left(m_{2,i}"
            r" + n_i \lvert\mathrm{mean}_i - \mathrm{mean}\rvert^2\right)."
        ),
    },
    "jaxbn.sync": {
        "d_i = mean_i - shift": r"d_i = \mathrm{mean}_i - \mathrm{shift}",
        "n = sum n_i,": r"n = \sum_i n_i,",
        "mean = shift + sum n_i d_i / n": Block(
            r"\mathrm{mean} = \mathrm{shift} + \frac{1}{n} \sum_i n_i d_i"
        ),
        "m2 = sum (m2_i + n_i |d_i|^2) - |sum n_i d_i|^2 / n.": Block(
            r"m_2 = \sum_i \left(m_{2,i} + n_i \lvert d_i\rvert^2\right)"
            r" - \frac{1}{n} \left|\sum_i n_i d_i\right|^2."
        ),
    },
    "jaxbn.update_running": {
        "m2 / (count - ddof)": r"m_2 / (\mathrm{count} - \mathrm{ddof})",
    },
    "jaxbn.adapt": {
        "w = prior / (prior + count),": (
            r"w = \mathrm{prior} / (\mathrm{prior} + \mathrm{count}),"
        ),
        "mean = w mean_running + (1 - w) mean_batch": Block(
            r"\mathrm{mean} = w\, \mathrm{mean}_\mathrm{running}"
            r" + (1 - w)\, \mathrm{mean}_\mathrm{batch}"
        ),
        "var = w var_running + (1 - w) var_batch.": Block(
            r"\mathrm{var} = w\, \mathrm{var}_\mathrm{running}"
            r" + (1 - w)\, \mathrm{var}_\mathrm{batch}."
        ),
    },
    "jaxbn.pool": {
        "w_i = count_i / sum count,": (
            r"w_i = \mathrm{count}_i / \sum_j \mathrm{count}_j,"
        ),
        "mean = sum w_i mean_i": Block(
            r"\mathrm{mean} = \sum_i w_i\, \mathrm{mean}_i"
        ),
        "var = sum w_i (var_i + |mean_i - mean|^2).": Block(
            r"\mathrm{var} = \sum_i w_i \left(\mathrm{var}_i"
            r" + \lvert\mathrm{mean}_i - \mathrm{mean}\rvert^2\right)."
        ),
    },
    "jaxbn.linen.BatchNorm": {
        "y = (x - mean) / sqrt(var + epsilon) * scale + bias,": _LAYER,
    },
    "jaxbn.nnx.BatchNorm": {
        "y = (x - mean) / sqrt(var + epsilon) * scale + bias,": _LAYER,
    },
}


def typeset(lines: list[str], formulas: dict[str, str]) -> list[str]:
    """Returns the lines of a docstring with its formulas as markup.

    Raises:
      ValueError: the lines do not contain one of the formulas.
    """
    result: list[str] = []
    missing = set(formulas)
    for paragraph in _paragraphs(lines):
        text = " ".join(paragraph)
        found = [f for f in missing if f in text and text[0] != " "]
        missing.difference_update(found)
        for formula in sorted(found, key=len, reverse=True):
            tex = formulas[formula]
            if isinstance(tex, Block):
                markup = f"\n\n.. math::\n\n   {tex}\n\n"
            else:
                markup = f":math:`{tex}`"
            text = text.replace(formula, markup, 1)
        if not found:
            result += paragraph
            continue
        # Text after a block must not be indented as the block is.
        result += [
            line.rstrip() if line.startswith("   ") else line.strip()
            for line in text.split("\n")
        ]
    if missing:
        raise ValueError(f"no longer contains {', '.join(sorted(missing))}")
    return result


def _paragraphs(lines: list[str]) -> list[list[str]]:
    """Splits at empty lines, which are paragraphs of their own."""
    found: list[list[str]] = []
    for line in lines:
        if line and found and found[-1][0]:
            found[-1].append(line)
        else:
            found.append([line])
    return found


def _typeset(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    if what in ("class", "function") and name in FORMULAS:
        try:
            lines[:] = typeset(lines, FORMULAS[name])
        except ValueError as error:
            _log.warning("formulas.py: the docstring of %s %s.", name, error)


def setup(app: Sphinx) -> dict[str, Any]:
    # Before markup is escaped, which leaves literal text as it is.
    app.connect("autodoc-process-docstring", _typeset, priority=390)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

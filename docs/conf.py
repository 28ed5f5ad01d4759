"""Settings of Sphinx, which builds this site: ``make docs``."""

import os
import re
from importlib.resources import files
from pathlib import Path

from docutils import nodes
from math_core import LatexToMathML
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

from pyro_sinflow import __version__

project = "pyro-sinflow"
author = "The pyro-sinflow authors"
project_copyright = f"2026, {author}"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"{project} {version}"

# Formulas become MathML when the site is built, so that pages load no script to typeset them. The
# font has the sizes and spaces that MathML needs, which the fonts of a reader's machine may lack.
html_math_renderer = "mathml"
html_static_path = ["_static", str(files("ziamath.fonts") / "STIXTwoMath-Regular.ttf")]
html_css_files = ["site.css"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Every page that computes is run at every build, and the build fails where a page does.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_output_stderr = "error"
os.environ["OMP_NUM_THREADS"] = "1"  # threads gain nothing for networks this small
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's, of widgets that pages lack

rst_prolog = ".. role:: py(code)\n   :language: python\n"  # as zuko's docstrings have it
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
add_module_names = False

highlight_language = "text"  # of blocks that name no language: most are commands

# Each reference must lead somewhere, but for those to other projects, whose inventories would have
# to be fetched.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|zuko|pyro|collections|constraints)\..*"),
    ("py:.*", r"Any|Callable|Iterable|Iterator|Sequence|.*optional"),
    ("py:.*", r"Flow|MaskedAutoregressiveTransform|MaskedLinear|Size|Tensor|Transform"),
]

_mathml = LatexToMathML()
_EXTERNAL = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["'](?:https?:)?//[^"']*"""
    r"""|<link\b(?=[^>]*\brel=["'](?:stylesheet|preload|preconnect|icon))[^>]*\bhref=["'](?:https?:)?//[^"']*"""
    r"""|(?:url\(|@import\s)\s*["']?(?:https?:)?//[^"')]*""",
    re.IGNORECASE,
)


def inline_formula(self: HTML5Translator, node: nodes.math) -> None:
    """Writes a formula within a line."""
    self.body.append(_mathml.convert_with_local_state(node.astext(), displaystyle=False))
    raise nodes.SkipNode


def displayed_formula(self: HTML5Translator, node: nodes.math_block) -> None:
    """Writes a formula of its own, whose lines are aligned if there are several."""
    latex = node.astext()
    if r"\\" in latex and r"\begin{" not in latex:
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    self.body.append(self.starttag(node, "div", CLASS="math"))
    self.body.append(_mathml.convert_with_local_state(latex, displaystyle=True))
    self.body.append("</div>")
    raise nodes.SkipNode


def keep_together(app: Sphinx, doctree: nodes.document) -> None:
    """Keeps a figure and its error on one line of a table's cell."""
    for cell in doctree.findall(nodes.entry):
        for text in [*cell.findall(nodes.Text)]:
            text.parent.replace(
                text, nodes.Text(text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"))
            )


def check_resources(app: Sphinx, error: Exception | None) -> None:
    """Warns, and so fails the build, if a page loads anything from another host."""
    if error is not None or app.builder.name != "html":
        return
    for path in sorted(Path(app.outdir).rglob("*")):
        if path.suffix in (".html", ".css"):
            for found in _EXTERNAL.findall(path.read_text(encoding="utf-8")):
                logging.getLogger(__name__).warning("%s loads %s", path.name, found)


def setup(app: Sphinx) -> None:
    """Registers the writer of formulas, and what changes and checks pages."""
    app.add_html_math_renderer("mathml", (inline_formula, None), (displayed_formula, None))
    app.connect("doctree-read", keep_together)
    app.connect("build-finished", check_resources)

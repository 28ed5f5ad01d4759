"""Settings of Sphinx, which builds this site: ``make docs``."""

import os

from pyro_sinflow import __version__

project = "pyro-sinflow"
author = "The pyro-sinflow authors"
project_copyright = f"2026, {author}"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"{project} {version}"

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
add_module_names = False

# Each reference must lead somewhere, but for those to other projects, whose inventories would have
# to be fetched.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|zuko|pyro|collections|constraints)\..*"),
    ("py:.*", r"Any|Callable|Iterable|Iterator|Sequence|.*optional"),
    ("py:.*", r"Flow|MaskedAutoregressiveTransform|MaskedLinear|Size|Tensor|Transform"),
]

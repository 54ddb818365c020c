"""Configuration of the documentation site: `uv run --group docs sphinx-build -W docs site`."""

project = "jaxlin"
copyright = "the jaxlin authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["notebooks/*.py", "notebooks/results"]
html_theme = "furo"
html_title = "jaxlin"
html_copy_source = False

nb_execution_mode = "off"  # they are kept with the outputs of a real run; tests run them
myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 2

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
default_role = "code"

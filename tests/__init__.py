"""Checks array shapes and types of every function of jaxlin while the tests run."""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# An int may stand for a float, as in the type system.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
install_import_hook("jaxlin", "tests.checked")

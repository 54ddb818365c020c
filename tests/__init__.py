"""Checks array shapes and types of every function of jaxlin while the tests run."""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# An int may stand for a float, as in the type system.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function):
    """Has calls of a function checked; not of one within another, which would be prepared at each of its calls."""
    return function if "<locals>" in function.__qualname__ else _check(function)


install_import_hook("jaxlin", "tests.checked")

"""Every inequality of the theory as a function that returns a `Bound`: what it says beside what was measured."""

from jaxlin.theory.bound import Bound
from jaxlin.theory.inequalities import (
    contraction,
    descent_step,
    distance_a_posteriori,
    distance_a_priori,
    distance_by_recursion,
    kernel_drift,
    monotone_descent,
    output_gap,
    parameter_gap,
    pull_sum,
    same_theta_gap,
    selective_direction,
)
from jaxlin.theory.perturbation import (
    Perturbation,
    chain_bounds,
    condition,
    perturbation,
    perturbation_table,
    relative,
    tightest,
    weyl,
    weyl_all_pairs,
)

__all__ = [
    "Bound",
    "Perturbation",
    "chain_bounds",
    "condition",
    "contraction",
    "descent_step",
    "distance_a_posteriori",
    "distance_a_priori",
    "distance_by_recursion",
    "kernel_drift",
    "monotone_descent",
    "output_gap",
    "parameter_gap",
    "perturbation",
    "perturbation_table",
    "pull_sum",
    "relative",
    "same_theta_gap",
    "selective_direction",
    "tightest",
    "weyl",
    "weyl_all_pairs",
]

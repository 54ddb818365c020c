"""What the kernel's predictions show: figures and findings of study 08."""

from __future__ import annotations

FULL, PULLED = "full", "full_pulled"
PROBE, ALONE, REGRESSION, LOGISTIC = "linear_probe", "kernel_alone", "kernel_regression", "kernel_logistic"
MAJORITY = "majority_class"


def draw(tables):
    return {}


def findings(tables):
    return {}

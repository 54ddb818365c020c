"""jaxlin: linearized fine-tuning of transformer language models."""

from jaxlin import optim
from jaxlin.data.dataset import Dataset
from jaxlin.errors import InputError, TrainingDivergedError
from jaxlin.linearize import linearize
from jaxlin.models.linen import from_hf_flax, from_linen
from jaxlin.models.load import load_masked_lm, load_model
from jaxlin.models.model import Model
from jaxlin.models.probe import probe_head
from jaxlin.nnx import from_nnx
from jaxlin.ntk.engine import ntk, ntk_estimate
from jaxlin.ntk.kernel import Kernel
from jaxlin.ntk.store import load_kernel
from jaxlin.peft.function import merge
from jaxlin.peft.ia3 import ia3
from jaxlin.peft.lora import lora
from jaxlin.peft.select import bias_only, full, head_only, layer_norm_only, select
from jaxlin.theory.regression import KernelRegression, kernel_regression
from jaxlin.theory.spectrum import Spectrum, spectrum
from jaxlin.training.compare import Comparison, compare
from jaxlin.training.trainer import TrainConfig, TrainResult, predict, train
from jaxlin.tunable import Tunable

__all__ = [
    "Comparison",
    "Dataset",
    "InputError",
    "Kernel",
    "KernelRegression",
    "Model",
    "Spectrum",
    "TrainConfig",
    "TrainResult",
    "TrainingDivergedError",
    "Tunable",
    "bias_only",
    "compare",
    "from_hf_flax",
    "from_linen",
    "from_nnx",
    "full",
    "head_only",
    "ia3",
    "kernel_regression",
    "layer_norm_only",
    "linearize",
    "load_kernel",
    "load_masked_lm",
    "load_model",
    "lora",
    "merge",
    "ntk",
    "ntk_estimate",
    "optim",
    "predict",
    "probe_head",
    "select",
    "spectrum",
    "train",
]

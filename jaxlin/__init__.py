"""jaxlin: linearized fine-tuning of transformer language models."""

from jaxlin import bounds, optim
from jaxlin.data.dataset import Dataset
from jaxlin.errors import DeviceMemoryError, InputError, Interrupted, ProcessLostError, TrainingDivergedError
from jaxlin.linearize import linearize
from jaxlin.mesh import make_mesh
from jaxlin.models.export import save_model
from jaxlin.models.linen import from_hf_flax, from_linen
from jaxlin.models.load import load_causal_lm, load_masked_lm, load_model, with_remat
from jaxlin.models.model import Model
from jaxlin.models.next_token import next_token_batch, next_token_logits, next_token_loss
from jaxlin.models.probe import probe_head
from jaxlin.models.prompt import prompt_batch, prompt_classifier
from jaxlin.nnx import from_nnx
from jaxlin.ntk.engine import ntk, ntk_estimate, ntk_plan
from jaxlin.ntk.kernel import Kernel
from jaxlin.ntk.lanczos import (
    estimate_effective_dimension,
    estimate_trace,
    extreme_eigenvalues,
    lanczos_quadrature,
    spectral_density,
)
from jaxlin.ntk.lipschitz import LipschitzProfile, lipschitz_profile
from jaxlin.ntk.neural_tangents import load_neural_tangents
from jaxlin.ntk.products import NTKOperator, ntk_vector_product
from jaxlin.ntk.sketch import sketch
from jaxlin.ntk.store import load_kernel
from jaxlin.peft.adapter import load_adapter, save_adapter
from jaxlin.peft.function import merge
from jaxlin.peft.ia3 import ia3
from jaxlin.peft.lora import lora
from jaxlin.peft.prompt import prompt_tuning
from jaxlin.peft.select import bias_only, full, head_only, layer_norm_only, select
from jaxlin.selection import LayerSelection, select_layers
from jaxlin.sharding import DECODER_RULES, ENCODER_RULES, shard
from jaxlin.theory.blockwise import BlockwiseRegression, blockwise_regression
from jaxlin.theory.calibration import Calibration, calibration
from jaxlin.theory.early_stopping import EarlyStopping, early_stopping
from jaxlin.theory.logistic import KernelLogisticRegression, kernel_logistic_regression
from jaxlin.theory.regression import KernelRegression, kernel_regression
from jaxlin.theory.spectrum import Spectrum, spectrum
from jaxlin.training.checkpoint import Checkpoints, load_checkpoint
from jaxlin.training.choices import train_choices
from jaxlin.training.compare import Comparison, compare
from jaxlin.training.config import TrainConfig
from jaxlin.training.modes import Prepared, prepare
from jaxlin.training.report import LinearizationReport, linearization_report
from jaxlin.training.sweep import train_sweep
from jaxlin.training.together import Sweep
from jaxlin.training.trainer import TrainResult, predict, train
from jaxlin.trunk import cache_trunk
from jaxlin.tunable import Tunable

__all__ = [
    "DECODER_RULES",
    "ENCODER_RULES",
    "BlockwiseRegression",
    "Calibration",
    "Checkpoints",
    "Comparison",
    "Dataset",
    "DeviceMemoryError",
    "EarlyStopping",
    "InputError",
    "Interrupted",
    "Kernel",
    "KernelLogisticRegression",
    "KernelRegression",
    "LayerSelection",
    "LinearizationReport",
    "LipschitzProfile",
    "Model",
    "NTKOperator",
    "Prepared",
    "ProcessLostError",
    "Spectrum",
    "Sweep",
    "TrainConfig",
    "TrainResult",
    "TrainingDivergedError",
    "Tunable",
    "bias_only",
    "blockwise_regression",
    "bounds",
    "cache_trunk",
    "calibration",
    "compare",
    "early_stopping",
    "estimate_effective_dimension",
    "estimate_trace",
    "extreme_eigenvalues",
    "from_hf_flax",
    "from_linen",
    "from_nnx",
    "full",
    "head_only",
    "ia3",
    "kernel_logistic_regression",
    "kernel_regression",
    "lanczos_quadrature",
    "layer_norm_only",
    "linearization_report",
    "linearize",
    "lipschitz_profile",
    "load_adapter",
    "load_causal_lm",
    "load_checkpoint",
    "load_kernel",
    "load_masked_lm",
    "load_model",
    "load_neural_tangents",
    "lora",
    "make_mesh",
    "merge",
    "next_token_batch",
    "next_token_logits",
    "next_token_loss",
    "ntk",
    "ntk_estimate",
    "ntk_plan",
    "ntk_vector_product",
    "optim",
    "predict",
    "prepare",
    "probe_head",
    "prompt_batch",
    "prompt_classifier",
    "prompt_tuning",
    "save_adapter",
    "save_model",
    "select",
    "select_layers",
    "shard",
    "sketch",
    "spectral_density",
    "spectrum",
    "train",
    "train_choices",
    "train_sweep",
    "with_remat",
]

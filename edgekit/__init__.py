"""edgekit: PyTorch models to proven artifacts for the runtimes on edge devices.

    bundle = edgekit.export(module, example, targets=["onnxruntime", "executorch"], out="bundle")
    print(bundle.proof("onnxruntime-fp32").max_rel_error)

Importing it loads numpy alone.
"""

__version__ = "0.1.0"

from edgekit.artifact import Artifact
from edgekit.bundle import Bundle, open_bundle
from edgekit.classes import top_labels
from edgekit.contract import Backend, Finding, Session
from edgekit.decode.sampling import Sampling
from edgekit.errors import EdgekitError, MissingRuntime, NotProven, UsageError
from edgekit.export import check, export
from edgekit.generation import TextModel
from edgekit.image import ImageInput, read_image
from edgekit.model import Model
from edgekit.profile import Measurement, profile
from edgekit.program import Program, Reference
from edgekit.recipe import Recipe
from edgekit.registry import backend, backend_names
from edgekit.spec import Dim, TensorSpec
from edgekit.verify import Proof, verify

__all__ = [
    "Artifact",
    "Backend",
    "Bundle",
    "Dim",
    "EdgekitError",
    "Finding",
    "ImageInput",
    "Measurement",
    "MissingRuntime",
    "Model",
    "NotProven",
    "Program",
    "Proof",
    "Recipe",
    "Reference",
    "Sampling",
    "Session",
    "TensorSpec",
    "TextModel",
    "UsageError",
    "backend",
    "backend_names",
    "check",
    "export",
    "open_bundle",
    "profile",
    "read_image",
    "top_labels",
    "verify",
]

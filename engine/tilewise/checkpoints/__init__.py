"""Checkpoint folders: validated safetensors reading, table-driven copying, atomic writing.

Knows no model: a family says which tensor goes where, this package sees that the file is sound,
and that everything fits before any of it is read.
"""

from tilewise.checkpoints.copying import WeightRule, check_weights, fill_weights
from tilewise.checkpoints.manifest import verify_folder
from tilewise.checkpoints.reading import TensorInfo, WeightFiles, open_weights, read_config
from tilewise.checkpoints.writing import write_folder

__all__ = [
    "TensorInfo",
    "WeightFiles",
    "WeightRule",
    "check_weights",
    "fill_weights",
    "open_weights",
    "read_config",
    "verify_folder",
    "write_folder",
]

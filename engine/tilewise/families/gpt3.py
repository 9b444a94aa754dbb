"""GPT-3 (Brown et al. 2020): GPT-2's layers, dense and locally banded by turns.

Its weights were never published and transformers has no such class, so folders are in our own
format, that of transformer.py. PRESETS are the eight sizes of table 2.1, with its two slips mended:
13B has d_model 5120 (40 heads of 128), printed as 5140; XL has 16 heads of 128, printed as 24. The
paper does not give the width of a band: BAND is a choice of ours, and a field of the configuration.
"""

from typing import Any

from ..config import ModelConfig
from ..errors import ConfigError
from .transformer import config_from, config_to, ignored, rules, tied

__all__ = ["config_from", "config_to", "gpt3", "ignored", "rules", "tied"]

MODEL_TYPES = ("tilewise-gpt3",)
EXAMPLES: tuple[dict[str, Any], ...] = ()  # transformers has no such class
BAND = 256  # positions that a banded layer's query sees, itself among them
END_OF_TEXT = 50256
SIZES = {  # layers, d_model, heads
    "125M": (12, 768, 12),
    "350M": (24, 1024, 16),
    "760M": (24, 1536, 16),
    "1.3B": (24, 2048, 16),
    "2.7B": (32, 2560, 32),
    "6.7B": (32, 4096, 32),
    "13B": (40, 5120, 40),
    "175B": (96, 12288, 96),
}


def gpt3(size: str, **changes: Any) -> ModelConfig:
    """The configuration of one of SIZES, such as "125M"; changes: other fields of ModelConfig.

    The first layer is dense, the second banded, and so on. Raises ConfigError for another size.
    """
    if size not in SIZES:
        raise ConfigError(f"size is {size!r}; GPT-3 has {', '.join(SIZES)}")
    layers, width, heads = SIZES[size]
    values: dict[str, Any] = {
        "model_type": MODEL_TYPES[0],
        "vocab_size": 50257,
        "hidden_size": width,
        "num_heads": heads,
        "ffn_size": 4 * width,
        "decoder_layers": layers,
        "max_positions": 2048,
        "activation": "gelu_tanh",
        "windows": (None, BAND - 1) * (layers // 2),
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": (END_OF_TEXT,),
    }
    return ModelConfig(**(values | changes))


PRESETS: dict[str, ModelConfig] = {size: gpt3(size) for size in SIZES}

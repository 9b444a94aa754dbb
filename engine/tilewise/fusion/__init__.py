"""fuse(): run somebody else's model on tilewise's ops, in place, checked, and undone at will.

Known: nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention, nn.TransformerEncoder and the encoder and
decoder layers, Linear-activation-Linear in nn.Sequential; in Hugging Face's BERT, RoBERTa, GPT-2,
BART, LLaMA, GPT-NeoX and T5 attention, norms, feed-forward, and the loss of the models that guess
tokens: the next, masked ones, or those of a decoder.
"""

from .fusing import fuse
from .report import FusionReport, Replaced, Skipped

__all__ = ["FusionReport", "Replaced", "Skipped", "fuse"]

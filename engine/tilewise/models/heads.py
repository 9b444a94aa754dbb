"""What a model returns, and the output projections over the vocabulary.

Shapes: hidden [R, S, E]; logits [R, S, V].
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ModelConfig

IGNORED_LABEL = -100


@dataclass
class ModelOutput:
    """What one forward pass gave; fields that the model does not have stay None.

    logits [R, S, V]; last_hidden_state [R, S, E]; loss a scalar, the mean over labels other than
    -100; encoder_last_hidden_state [R, N, E].
    """

    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    loss: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None


def output_projection(config: ModelConfig, tokens: nn.Embedding) -> nn.Linear:
    """The bias-free map to the vocabulary, one matrix with the embeddings when they are tied."""
    head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    if config.tie_embeddings:
        head.weight = tokens.weight
    return head


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy [nats] over the labels other than -100."""
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL
    )


def initialise(module: nn.Module, std: float) -> None:
    """Matrices from N(0, std), biases 0, norms 1, as GPT and BERT start."""
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.ones_(parameter)

"""What a model returns, and what stands on its last hidden states.

Shapes: hidden [R, S, E]; logits [R, S, V].
"""

from dataclasses import dataclass

from torch import Tensor, nn

from tilewise_kernels import cross_entropy, linear_act

from ..config import ModelConfig
from ..layers import Linear, norm_of

IGNORED_LABEL = -100


@dataclass
class ModelOutput:
    """What one forward pass gave; fields that the model does not have stay None.

    logits [R, S, V]; last_hidden_state [R, S, E]; loss a scalar, the mean over labels other than
    -100; encoder_last_hidden_state [R, N, E]; pooler_output [R, E]; next_sentence_logits [R, 2]
    (0: the second text follows the first). With output_attentions the probabilities of each layer:
    attentions [R, H, S, S] (a seq2seq model's decoder), cross_attentions [R, H, S, N],
    encoder_attentions [R, H, N, N].
    """

    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    loss: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    next_sentence_logits: Tensor | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None


class OutputProjection(Linear):
    """The map to the vocabulary; one matrix with the embeddings when they are tied.

    It takes the embeddings' own size, where they have one.
    """

    def __init__(self, config: ModelConfig, tokens: nn.Embedding) -> None:
        size = config.embedding_size or config.hidden_size
        super().__init__(size, config.output_vocab_size, bias=config.output_bias)
        self.scale = config.output_scale
        if config.tie_embeddings:
            self.weight = tokens.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., E] to logits [..., V]."""
        if self.scale != 1.0:
            hidden = hidden * self.scale
        return super().forward(hidden)


class MaskedHead(nn.Module):
    """Linear, activation, norm and the map to the vocabulary (Devlin et al. 2019, appendix)."""

    def __init__(self, config: ModelConfig, tokens: nn.Embedding) -> None:
        super().__init__()
        size = config.embedding_size or config.hidden_size
        assert config.masked_head is not None
        self.activation = config.masked_head
        self.linear = Linear(config.hidden_size, size, bias=config.masked_head_bias)
        self.norm = norm_of(config, size)
        self.output = OutputProjection(config, tokens)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., E] to logits [..., V]."""
        bent = linear_act(hidden, self.linear.weight, self.linear.bias, activation=self.activation)
        return self.output(self.norm(bent))


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy [nats] over the labels other than -100, 0 where there is none."""
    return cross_entropy(logits, labels, ignore_index=IGNORED_LABEL)


def initialise(module: nn.Module, std: float) -> None:
    """Matrices from N(0, std), biases 0, norms 1, as GPT and BERT start."""
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.ones_(parameter)

"""Every op at its shapes, against everyone who may compete: torch's ways and installed peers."""

from collections.abc import Callable

from tilewise_kernels.bench_cases import Options, Shape

SHAPES: dict[str, list[tuple[Shape, Options]]] = {
    "softmax": [  # plain, masked, causal, and rows short and wide
        ((8, 12, 512, 512), Options(mask=True)),
        ((8, 12, 512, 512), Options()),
        ((8, 12, 512, 512), Options(causal=True)),
        ((16384, 64), Options()),
    ],
    "attention": [  # causal, padded, cross-attention, grouped heads, a long text
        ((2, 8, 512, 512, 64), Options(causal=True)),
        ((2, 8, 512, 512, 64), Options(mask=True)),
        ((2, 8, 512, 512, 64), Options(bias=True)),
        ((8, 8, 64, 256, 64), Options()),
        ((2, 8, 512, 512, 64), Options(causal=True, heads_kv=2)),
        ((1, 4, 2048, 2048, 64), Options(causal=True)),
        ((1, 4, 2048, 2048, 64), Options(causal=True, window=128)),
    ],
    "attention_varlen": [  # packed sequences, causal and not
        ((8, 8, 256, 64), Options(causal=True)),
        ((8, 8, 256, 64), Options()),
    ],
    "decode_attention": [  # a step of beam search, grouped heads, few rows
        ((32, 12, 64, 64), Options(beams=True)),
        ((32, 12, 256, 64), Options(beams=True)),
        ((32, 12, 512, 64), Options(beams=True)),
        ((32, 12, 1024, 64), Options(beams=True)),
        ((32, 12, 512, 64), Options()),
        ((16, 8, 1024, 64), Options(heads_kv=2)),
        ((4, 12, 128, 64), Options()),
    ],
    "layer_norm": [  # with and without the residual add
        ((4096, 768), Options(residual=True)),
        ((4096, 768), Options()),
        ((1024, 4096), Options(residual=True)),
    ],
    "rms_norm": [  # with and without the residual add
        ((4096, 768), Options(residual=True)),
        ((4096, 768), Options()),
        ((1024, 4096), Options(residual=True)),
    ],
    "linear_act": [  # activations, and few rows
        ((1024, 768, 3072), Options()),
        ((1024, 768, 3072), Options(activation="gelu_tanh")),
        ((1024, 768, 3072), Options(activation="relu")),
        ((16, 768, 3072), Options()),
        ((2, 768, 3072), Options(activation="identity")),
    ],
    "feed_forward": [  # plain and gated, and few rows
        ((512, 768, 3072), Options()),
        ((512, 768, 3072), Options(activation="relu")),
        ((512, 768, 2048), Options(activation="silu", gated=True)),
        ((16, 768, 3072), Options()),
        ((2, 768, 3072), Options()),
    ],
    "linear": [  # the packed products of a decoding step, float and int8
        ((32, 768, 3072), Options()),
        ((32, 768, 3072), Options(int8=True)),
        ((32, 3072, 768), Options()),
        ((32, 3072, 768), Options(int8=True)),
        ((32, 768, 50257), Options()),
        ((32, 768, 50257), Options(int8=True)),
        ((4, 768, 3072), Options()),
    ],
    "rotary": [  # full and grouped heads
        ((4, 12, 512, 64), Options()),
        ((1, 32, 1024, 128), Options(heads_kv=8)),
    ],
    "log_softmax": [  # a vocabulary
        ((256, 50257), Options()),
    ],
    "log_softmax_topk": [  # what a step of beam search asks of the vocabulary
        ((32, 50257), Options()),
        ((32, 50257), Options(top=1)),
        ((32, 128256), Options(top=16)),
    ],
    "cross_entropy": [  # two vocabularies
        ((1024, 32000), Options()),
        ((256, 128256), Options()),
    ],
    "linear_cross_entropy": [  # two vocabularies
        ((1024, 512, 32000), Options()),
        ((1024, 512, 128256), Options()),
    ],
}


def bench_every_op(
    bench_op: Callable[..., None],
    op: str,
    shape: Shape,
    options: Options,
    direction: str,
    contender: str,
) -> None:
    bench_op(op, shape, options, direction, contender)

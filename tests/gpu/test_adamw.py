"""adamw_step's Triton kernel against torch.optim.AdamW; nothing waits for the GPU."""

import pytest
import torch

from tilewise_kernels import adamw_step, force

pytestmark = pytest.mark.gpu
FLOAT, BF16 = torch.float32, torch.bfloat16
SHAPES = [(1,), (1000, 77), (5,), (3, 4, 129)]


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_steps_equal_torchs(max_norm, normal) -> None:
    params = [normal(*shape) for shape in SHAPES]
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    for t in range(1, 6):
        grads = [normal(*shape) for shape in SHAPES]
        with force("triton"):
            norm = adamw_step(params, grads, m, v, t, lr=1e-2, weight_decay=0.1, max_norm=max_norm)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        if max_norm is not None:
            torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
        optimizer.step()
    torch.testing.assert_close(params, [p.detach() for p in theirs], rtol=1e-5, atol=1e-6)


def test_masters(normal, gpu_only) -> None:
    gpu_only("Triton that rounds bfloat16 right")
    params = [normal(*shape, dtype=BF16) for shape in SHAPES]
    master = [p.float() for p in params]
    wide = [p.float() for p in params]
    states = [[torch.zeros_like(p) for p in wide] for _ in range(4)]
    for t in range(1, 6):
        grads = [normal(*shape, dtype=BF16) for shape in SHAPES]
        adamw_step(params, grads, *states[:2], t, lr=1e-3, master=master)
        adamw_step(wide, [g.float() for g in grads], *states[2:], t, lr=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(master, wide, strict=True))
    assert all(torch.equal(p, w.to(BF16)) for p, w in zip(params, master, strict=True))


def test_a_graph_replays_with_its_step_on_the_device(normal, gpu_only, device) -> None:
    gpu_only("CUDA graphs")
    p, g = [normal(1000)], [normal(1000)]
    m, v = ([torch.zeros_like(p[0])] for _ in range(2))
    step = torch.ones((), device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        adamw_step(p, g, m, v, step, lr=0.0, max_norm=1.0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw_step(p, g, m, v, step, lr=1e-2, max_norm=1.0)
    plain = [[x[0].clone()] for x in (p, m, v)]
    for t in (2, 3):
        step.fill_(t)
        graph.replay()
        adamw_step(plain[0], g, plain[1], plain[2], t, lr=1e-2, max_norm=1.0)
    torch.testing.assert_close(p[0], plain[0][0])

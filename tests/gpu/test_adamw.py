"""adamw_step's Triton kernel against torch.optim.AdamW; nothing waits for the GPU."""

import pytest
import torch

from tilewise_kernels import adamw_step, adamw_triton, explain, force

pytestmark = pytest.mark.gpu
FLOAT, BF16 = torch.float32, torch.bfloat16
SHAPES = [(1,), (1000, 77), (5,), (0, 4), (3, 4, 129)]


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


@pytest.mark.parametrize("theirs", ({"fused": True}, {"foreach": True}), ids=str)
@pytest.mark.parametrize("dtype", (FLOAT, BF16, torch.float16, torch.float64), ids=str)
def test_accuracy_beside_torchs_own(dtype, theirs, normal) -> None:
    """Moments in the parameters' dtype: at most twice as far from float64 as torch is."""
    params = [normal(*shape, dtype=dtype) for shape in SHAPES]
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    plain, exact = ([torch.nn.Parameter(p.to(d)) for p in params] for d in (dtype, torch.float64))
    optimizers = [torch.optim.AdamW(plain, lr=1e-2, eps=1e-6, **theirs)]
    optimizers.append(torch.optim.AdamW(exact, lr=1e-2, eps=1e-6))
    for t in (1, 2, 3):
        grads = [normal(*shape, dtype=dtype).sign() for shape in SHAPES]
        adamw_step(params, grads, m, v, t, lr=1e-2, eps=1e-6)
        for each, optimizer in zip((plain, exact), optimizers, strict=True):
            for p, g in zip(each, grads, strict=True):
                p.grad = g.to(p.dtype, copy=True)
            optimizer.step()
    errors = [
        max((a - b).abs().max().item() for a, b in zip(each, exact, strict=True) if a.numel())
        for each in (params, plain)
    ]
    rounding = torch.finfo(torch.float64 if dtype == torch.float64 else FLOAT).eps
    assert errors[0] <= 2 * errors[1] + 8 * rounding


def test_views_of_one_buffer_and_several_kinds(normal) -> None:
    """Addresses that are no multiple of 16 bytes; float32, float16 and masters in one list."""
    sizes = (3, 1001, 4097, 2, 6000)
    state = []
    for _ in range(4):
        flat, half = normal(sum(sizes)).abs(), normal(10000, dtype=torch.float16).abs()
        state.append([*flat.split(sizes), *half.split([4999, 5001])])
    params, grads, m, v = state
    m[-1], v[-1] = m[-1].float(), v[-1].float()
    master = [*[None] * (len(params) - 1), params[-1].float()]
    plain = [[t.clone() for t in each] for each in (params, m, v)]
    copied = [w if w is None else w.clone() for w in master]
    for t in (1, 2):
        for way, (p, a, b), w in (
            ("triton", (params, m, v), master), ("reference", plain, copied)
        ):  # fmt: skip
            with force(way):
                adamw_step(p, grads, a, b, t, lr=1e-2, master=w, max_norm=1.0)
    torch.testing.assert_close(
        [*params[:5], *m[:5], master[-1]], [*plain[0][:5], *plain[1][:5], copied[-1]]
    )
    torch.testing.assert_close(params[5:], plain[0][5:], rtol=2e-3, atol=1e-6)


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


@pytest.mark.parametrize("dtype", (FLOAT, torch.float16), ids=str)
def test_many_tensors_in_one_launch(dtype, normal, pick, monkeypatch) -> None:
    """As the reference does, and as often as they are stepped: the table is kept."""
    launched = []
    run = adamw_triton.Launch.run

    def counted(launch, device) -> None:
        launched.append(launch.grid)
        run(launch, device)

    monkeypatch.setattr(adamw_triton.Launch, "run", counted)
    sizes = [1 + 997 * i % pick(50000, 3000) for i in range(pick(150, 20))]
    ours, plain = ([[normal(n, dtype=dtype) for n in sizes]] for _ in range(2))
    plain[0] = [p.clone() for p in ours[0]]
    for state in (ours, plain):
        state += [[p.new_zeros(p.shape, dtype=FLOAT) for p in state[0]] for _ in range(2)]
    grads = [normal(n, dtype=dtype) for n in sizes]
    for t in (1, 2, 3):
        for way, (p, m, v) in (("triton", ours), ("reference", plain)):
            with force(way):
                adamw_step(p, grads, m, v, t, lr=1e-2, max_norm=1.0)
    assert len(launched) == 3
    torch.testing.assert_close(ours[1:], plain[1:], rtol=1e-5, atol=1e-6)
    rounding = {} if dtype == FLOAT else {"rtol": 2e-3, "atol": 1e-6}
    torch.testing.assert_close(ours[0], plain[0], **rounding)


def test_strided_tensors(normal) -> None:
    plain = [normal(60, 90), normal(60, 90)]
    moved = [plain[0].t().contiguous().t(), plain[1].repeat_interleave(2, -1)[..., ::2]]
    zeros = [[torch.zeros_like(plain[0]) for _ in plain] for _ in range(4)]
    for t in (1, 2):
        grads = [normal(60, 90), normal(90, 60).t()]
        with force("triton"):
            adamw_step(plain, grads, *zeros[:2], t, lr=1e-2)
            adamw_step(moved, grads, *zeros[2:], t, lr=1e-2)
    torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-7)


def test_who_runs(normal, gpu_only) -> None:
    gpu_only("choice to make")
    for dtype, way in ((FLOAT, "triton"), (BF16, "triton"), (torch.float64, "reference")):
        lists = ([normal(5, dtype=dtype)] for _ in range(4))
        assert explain(adamw_step, *lists, 1, lr=0.1).implementation == way


def test_nothing_waits(normal, gpu_only) -> None:
    """The table is made and copied, then found; the norm is taken."""
    gpu_only("queue to wait for")
    p, g, m, v = ([normal(*shape).abs() for shape in SHAPES] for _ in range(4))
    adamw_step(p, g, m, v, 1, lr=0.1, max_norm=1.0)  # compiles
    adamw_triton._copied.cache_clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in (2, 3):
            adamw_step(p, g, m, v, t, lr=0.1, max_norm=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_past_two_to_the_31_elements(device, gpu_only, room) -> None:
    gpu_only("memory for it")
    room(20)
    size = 2**31 + 4100
    p, g, m, v = (torch.zeros(size, dtype=torch.float16, device=device) for _ in range(4))
    g[-4097:] = 1
    with force("triton"):
        adamw_step([p], [g], [m], [v], 1, lr=0.5, weight_decay=0.0, eps=1e-3)
    assert (p[-4097:] < -0.4).all() and not p[:4096].any() and not p[-5000:-4097].any()


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


def test_a_graph_holds_its_table(normal, gpu_only) -> None:
    """Gradients that are made inside the graph; tables and memory of before are gone at replay."""
    gpu_only("CUDA graphs")
    params = [normal(n) for n in (1000, 3, 5000)]
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    plain = [[t.clone() for t in each] for each in (params, m, v)]

    def step(params, m, v) -> None:
        adamw_step(params, [p.sin() for p in params], m, v, 3, lr=1e-2, max_norm=1.0)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*[[t.clone() for t in each] for each in plain])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(params, m, v)
    adamw_triton._copied.cache_clear()
    torch.cuda.empty_cache()
    junk = [torch.full((1 << 10,), -1, device=params[0].device) for _ in range(200)]
    for _ in range(3):
        graph.replay()
        step(*plain)
    del junk
    torch.testing.assert_close([params, m, v], plain, rtol=1e-6, atol=1e-7)

"""Windows in flash-attn-4 with merged sinks, and who is chosen for them. Without the package a stand-in takes its place."""

import sys
from importlib.metadata import PackageNotFoundError
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from rtpurbo import ops
from rtpurbo.ops import flash4, kernels
from rtpurbo.ops.reference import gather_slots, near_slots, sink_slots, visible_slots

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5} if DEVICE == "cpu" else {"atol": 2e-2, "rtol": 2e-2}
DIM, SCALING = 64, 0.125
MODULES = ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")


def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size, return_lse):
    """As the real one: [B, T, H, D], the last query at the last key; log-sum-exps in nats, [B, H, T] float32."""
    assert causal
    assert return_lse
    assert window_size[1] == 0
    assert all(x.stride(-1) == 1 and all(stride % 8 == 0 for stride in x.stride()[:-1]) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    slots, queries = k.shape[2], q.shape[2]
    age = torch.arange(slots - queries, slots, device=q.device)[:, None] - torch.arange(slots, device=q.device)
    logits = (q @ k.mT).float() * softmax_scale
    logits = logits.masked_fill((age < 0) | (age > window_size[0]), -torch.inf)
    out = logits.softmax(-1).to(v.dtype) @ v
    return out.transpose(1, 2).contiguous(), logits.logsumexp(-1)


def put_modules(monkeypatch, path=()):
    """Modules by flash-attn-4's names."""
    for name in MODULES:
        module = ModuleType(name)
        module.__path__ = [str(x) for x in path]
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules[MODULES[-1]].flash_attn_func = flash_attn_func
    monkeypatch.setattr(flash4, "version", lambda name: "4.0.0")


@pytest.fixture
def fresh():
    """What was found about the package is forgotten."""
    flash4.problem.cache_clear()
    yield
    flash4.problem.cache_clear()


@pytest.fixture(params=["stand-in", "the package"])
def flash(request, monkeypatch, fresh):
    if request.param == "stand-in":
        put_modules(monkeypatch)
    elif DEVICE == "cpu" or flash4.problem(DIM):
        pytest.skip("needs a Hopper or Blackwell GPU and flash-attn-4")


def draw(*shape):
    """[B, H, T, D] as a projection gives it: tokens outermost."""
    return torch.randn(shape[0], shape[2], shape[1], shape[3]).to(DEVICE, DTYPE).transpose(1, 2)


def attended(q, k, v, sinks, window):
    """[B, H, T, D] from keys and values of every query head, under an explicit mask."""
    k_slots = torch.arange(k.shape[2], device=DEVICE)
    q_slots = k_slots[k.shape[2] - q.shape[2] :]
    allowed = visible_slots(q_slots, k_slots, None) & near_slots(q_slots, k_slots, sinks, window)
    logits = (q.float() @ k.float().mT) * SCALING
    return logits.masked_fill(~allowed, -torch.inf).softmax(-1) @ v.float()


ALL = (tuple(range(8)), (0, 0, 1, 1, 2, 2, 3, 3))
PLACES = {
    "all groups": ALL,
    "two runs": ((0, 1, 4, 5, 6, 7), (0, 0, 1, 1, 2, 2)),
    "rows in another order": ((0, 1, 2, 3, 4, 5), (2, 2, 0, 0, 1, 1)),
    "parts of groups": ((1, 4, 5, 6), (0, 2, 2, 3)),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize(
    ("slots", "queries", "first_slot", "window", "sinks"),
    [
        (1, 1, 0, 1, []),
        (40, 40, 0, 1, [[0, 1]]),
        (150, 150, 0, 30, [[0, 1, 2]]),
        (150, 150, 0, 30, []),
        (150, 70, 40, 30, [[0, 1, 2, 3]]),
        (150, 70, 0, 30, [[0, 90, -1], [7, -1, -1]]),  # one comes into the middle of the queries
        (65, 65, 0, 65, [[0, 1]]),
        (65, 20, 0, 100, [[0, 1]]),
    ],
)
def test_windows_and_sinks(slots, queries, first_slot, window, sinks, name, flash):
    heads, rows = PLACES[name]
    q, k, v = draw(2, 8, queries, DIM), draw(2, 4, slots, DIM), draw(2, 4, slots, DIM)
    sinks = torch.tensor(sinks or [[]], dtype=torch.int64, device=DEVICE)
    out = torch.full(q.shape, torch.nan, dtype=DTYPE, device=DEVICE)
    place = kernels.Place(heads, rows, out, 2)
    assert flash4.fits(place)
    got = flash4.window_attention(
        q, k[:, :, first_slot:], v[:, :, first_slot:], gather_slots(k, sinks), gather_slots(v, sinks),
        first_slot=first_slot, sinks=sinks, window_tokens=window, scaling=SCALING, place=place,
    )  # fmt: skip
    assert got is out
    want = attended(q[:, heads], k[:, rows], v[:, rows], sinks, window)
    torch.testing.assert_close(out[:, heads].float(), want, **TOLERANCE)
    others = [head for head in range(8) if head not in heads]
    assert out[:, others].isnan().all()


@pytest.mark.parametrize(
    ("heads", "rows", "fit"),
    [(*ALL, True), ((0, 2, 4), (0, 1, 2), True), ((1, 6, 7, 9), (0, 1, 1, 2), True), ((), (), True)],
)
def test_half_of_the_heads_may_be_computed_in_vain(heads, rows, fit):
    out = torch.empty(0)
    assert flash4.fits(kernels.Place(heads, rows, out, 2)) == fit
    if heads != ALL[0]:
        assert flash4.fits(kernels.Place(heads, rows, out, 4)) == (not heads)


def run_layer(windows, slots=150, queries=70, real=None, retrieval=(1, 6, 7)):
    """`prefill_attention` of 8 heads in 4 groups, single heads selecting, always the same inputs."""
    torch.manual_seed(1)
    q, k, v = draw(1, 8, queries, DIM), draw(1, 4, slots, DIM), draw(1, 4, slots, DIM)
    index_q, index_k = (torch.randn(1, len(retrieval), n, 16).to(DEVICE, DTYPE) for n in (queries, slots))
    sinks = sink_slots(real, 3, device=DEVICE)
    full = sorted({head // 2 for head in retrieval})
    rows = (*full, *(g for g in range(4) if g not in full))
    full_k, full_v, local_k, local_v = (x[:, part] for part in (rows[: len(full)], rows[len(full) :]) for x in (k, v))
    first = 40
    return ops.prefill_attention(
        q, full_k, full_v, local_k[:, :, first:], local_v[:, :, first:], gather_slots(local_k, sinks),
        gather_slots(local_v, sinks), index_q, index_k, kv_rows=rows,
        head_units=tuple(retrieval.index(head) if head in retrieval else -1 for head in range(8)), first_slot=first,
        sinks=sinks, window_tokens=30, top_p=1.0, min_probability=0.02, scaling=SCALING, real=real, window_kernel=windows,
    )  # fmt: skip


def calls_of(monkeypatch):
    """Names of the modules whose `window_attention` is called, as a list that grows."""
    calls = []
    for module in (flash4, kernels):

        def window_attention(*args, module=module, real_one=module.window_attention, **more):
            calls.append(module.__name__.rpartition(".")[2])
            return real_one(*args, **more)

        monkeypatch.setattr(module, "window_attention", window_attention)
    return calls


@pytest.mark.parametrize(
    ("retrieval", "used"),
    [
        ((1, 6, 7), ["flash4", "flash4"]),  # the local groups 1 and 2, then half of group 0
        ((2, 3), ["flash4"]),
        ((0, 2, 4, 6), ["flash4"]),
    ],
)
def test_a_layer(retrieval, used, flash, monkeypatch):
    monkeypatch.setattr(ops.prefill, "_kernels", lambda q: kernels)
    calls = calls_of(monkeypatch)
    want = run_layer("triton", retrieval=retrieval)
    assert calls == ["kernels"] * len(used)
    calls.clear()
    got = run_layer("flash-attn-4", retrieval=retrieval)
    assert calls == used
    torch.testing.assert_close(got, want, **TOLERANCE)


@pytest.fixture
def hopper(monkeypatch, fresh):
    """A GPU that all kernels take, as far as the dispatch sees."""
    monkeypatch.setattr(ops.prefill, "backend", lambda *args: ("triton", "kernels"))
    monkeypatch.setattr(ops.prefill, "_kernels", lambda q: kernels)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))


def chosen(head_dim=128, **more):
    return ops.window_backend("cuda", torch.bfloat16, head_dim, **more)


def test_the_choice_and_its_reason(hopper, monkeypatch):
    put_modules(monkeypatch)
    assert chosen()[0] == "flash-attn-4"
    assert chosen(queries=1024)[0] == "flash-attn-4"
    for more, reason in [
        ({"queries": 1023}, "1023 queries are fewer than 1024"),
        ({"padded": True}, "the batch is padded"),
        ({"gradients": True}, "without gradients"),
        ({"head_dim": 32}, "the head dimension is 32, not one of 64, 128, 256"),
    ]:
        which, why = chosen(**more)
        assert which == "triton"
        assert reason in why
    for capability in ((8, 9), (12, 0)):
        flash4.problem.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args, capability=capability: capability)
        which, why = chosen()
        assert which == "triton"
        assert f"compute capability is {capability[0]}.{capability[1]}, not Hopper's or Blackwell's" in why


def test_without_triton_it_is_plain_torch():
    assert ops.window_backend("cpu", torch.bfloat16, 128) == ops.backend("cpu", torch.bfloat16, 128)
    assert ops.window_backend("cpu", torch.bfloat16, 128)[0] == "torch"


def test_a_package_that_is_not_installed(hopper, monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    put_modules(monkeypatch)
    monkeypatch.setattr(flash4, "version", version)
    assert chosen() == ("triton", "kernels; not flash-attn-4: it is not installed: pip install flash-attn-4")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "import a_compiler_that_is_missing",
            "it cannot be imported: ModuleNotFoundError: No module named 'a_compiler_that_is_missing'",
        ),
        ("raise ImportError('wrong version')", "it cannot be imported: ImportError: wrong version"),
        ("raise OSError('no libcuda.so')", "it cannot be imported: OSError: no libcuda.so"),
        ("raise RuntimeError('no driver\\nat all')", "it cannot be imported: RuntimeError: no driver"),
    ],
)
def test_a_failed_import_is_remembered_and_triton_goes_on(code, reason, hopper, monkeypatch, tmp_path):
    put_modules(monkeypatch, [tmp_path])
    monkeypatch.delitem(sys.modules, MODULES[-1])
    tried = tmp_path / "tried"
    (tmp_path / "interface.py").write_text(f"open({str(tried)!r}, 'a').write('x')\n{code}\n")
    monkeypatch.setattr(flash4, "LEAST_QUERIES", 1)
    calls = calls_of(monkeypatch)
    got = [run_layer(None) for _ in range(2)]
    assert calls == ["kernels"] * 4
    assert tried.read_text() == "x"
    which, why = chosen(DIM)
    assert which == "triton"
    assert why.endswith(reason)
    torch.testing.assert_close(got[0], run_layer("triton"))


def test_the_dispatch_decides_in_a_layer(hopper, monkeypatch):
    put_modules(monkeypatch)
    calls = calls_of(monkeypatch)
    run_layer(None)
    assert calls == ["kernels"] * 2  # few queries
    monkeypatch.setattr(flash4, "LEAST_QUERIES", 70)
    calls.clear()
    run_layer(None)
    assert calls == ["flash4"] * 2
    calls.clear()
    real = torch.ones(1, 150, dtype=torch.bool, device=DEVICE)
    real[:, :3] = False
    run_layer(None, real=real)
    run_layer("flash-attn-4", real=real)
    assert calls == ["kernels"] * 4

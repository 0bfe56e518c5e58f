"""Linear layers of an 8B decoder: whose bits are whose, and what a chain of them takes."""
import sys, time, itertools
from functools import partial
import torch, torch.nn.functional as F
from margingate.runtime.compat.batch_invariant_matmul import compile_ahead, invariant_matmul, kernel_counts
import deep_gemm
from sgl_kernel import silu_and_mul
try:
    from sgl_kernel import fused_add_rmsnorm
except Exception:
    from flashinfer.norm import fused_add_rmsnorm
import logging; logging.basicConfig(level=logging.INFO)
deep_gemm.set_pdl(True)
SH = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
torch.manual_seed(0)
W = {n: [torch.randn(s, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(4)] for n, s in SH.items()}
t0 = time.time()
compile_ahead([w[0] for w in W.values()], kernel_counts(8192))
print("compiled", round(time.time() - t0, 1), flush=True)
own = lambda x, w: invariant_matmul(x, weight=w, bias=None)
plain = lambda x, w: F.linear(x, w)
def nosplit(x, w):
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
    try:
        return F.linear(x, w)
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (True, True)
try:
    nosplit(torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16), W["o"][0])
except Exception as e:
    print("nosplit:", repr(e)[:200]); nosplit = None
OPS = {"plain": plain, "own": own, **({"nosplit": nosplit} if nosplit else {})}
COUNTS = [*range(1, 17), 20, 24, 32, 40, 48, 56, 64, 72, 80, 96, 112, 120, 128, 136, 144, 160, 184, 192, 200, 224, 256, 300, 384, 512, 700, 1024, 1500, 2048, 3000, 4096, 6000, 8192]
for n in SH:
    x = torch.randn(8192, SH[n][1], device="cuda", dtype=torch.bfloat16)
    ref = own(x, W[n][0])
    for name, op in OPS.items():
        same = [c for c in COUNTS if torch.equal(op(x[:c], W[n][0])[: min(c, 64)], ref[: min(c, 64)])]
        diff = [c for c in COUNTS if c not in same]
        print(n, name, "as own at", "all" if not diff else same, "" if not diff else f"not at {diff}", flush=True)
def graph_us(f, calls):
    f(); torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        f()
    best = []
    for _ in range(7):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); g.replay(); b.record(); b.synchronize(); best.append(a.elapsed_time(b))
    return round(sorted(best)[2] / calls * 1e3, 2)
big = [c for c in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192)]
for n in SH:
    x = torch.randn(8192, SH[n][1], device="cuda", dtype=torch.bfloat16)
    for name, op in OPS.items():
        out = {}
        for c in big:
            def f():
                for i in range(20 if c < 512 else 4): op(x[:c], W[n][i % 4])
            out[c] = graph_us(f, 20 if c < 512 else 4)
        print(n, name, out, flush=True)
# chain
norm = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
def layer(x, res, i, ops):
    fused_add_rmsnorm(x, res, norm, 1e-5)
    a = ops["qkv"](x, W["qkv"][i])
    b = ops["o"](a[:, :4096].contiguous() if a.shape[0] > 1 else a[:, :4096], W["o"][i])
    fused_add_rmsnorm(b, res, norm, 1e-5)
    c = silu_and_mul(ops["gate_up"](b, W["gate_up"][i]))
    return ops["down"](c, W["down"][i])
CH = {
 "all plain": dict.fromkeys(SH, plain),
 "own o down": {**dict.fromkeys(SH, plain), "o": own, "down": own},
 "own o down gate_up": {**dict.fromkeys(SH, own), "qkv": plain},
 "own all": dict.fromkeys(SH, own),
 "own o down qkv": {**dict.fromkeys(SH, own), "gate_up": plain},
 "own down, nosplit o": {**dict.fromkeys(SH, plain), "o": nosplit or plain, "down": own},
 "nosplit": dict.fromkeys(SH, nosplit or plain),
}
for pdl in (True, False):
    deep_gemm.set_pdl(pdl)
    for c in (1, 2, 8, 32, 64, 128):
        res = torch.zeros(c, 4096, device="cuda", dtype=torch.bfloat16)
        x0 = torch.randn(c, 4096, device="cuda", dtype=torch.bfloat16)
        row = {}
        for name, ops in CH.items():
            if not pdl and "own" not in name: continue
            def f():
                x = x0
                for i in range(32): x = layer(x, res, i % 4, ops)
            row[name] = graph_us(f, 32)
        print("pdl", pdl, c, row, flush=True)

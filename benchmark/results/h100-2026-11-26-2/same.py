import sys, torch, hashlib
from margingate_kernels import decode_attention, decode_workspace, plan_decode, Paged, softmax_top2
torch.manual_seed(5)
g = torch.Generator(device="cuda").manual_seed(7)
h = hashlib.sha256()
for heads, kv, d in ((32, 8, 128), (9, 3, 64), (40, 8, 128), (8, 4, 256)):
    n = 60000
    k, v = (torch.randn(n, kv, d, device="cuda", generator=g).bfloat16() for _ in "kv")
    for lengths in ([1], [300], [2100, 5, 256, 257, 8200], [33] * 64, [15000, 1, 4096]):
        q = torch.randn(len(lengths), heads, d, device="cuda", generator=g).bfloat16()
        slots = torch.randint(0, n, (sum(lengths),), device="cuda", generator=g)
        indptr = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
        ws = decode_workspace(len(lengths), 400, heads, d, "cuda"); out = torch.empty_like(q)
        plan_decode(indptr, ws); decode_attention(q, Paged(k, v, slots, indptr), d ** -0.5, out, ws)
        h.update(out.view(torch.int16).cpu().numpy().tobytes())
        assert not out.isnan().any()
for rows in (1, 64):
    x = torch.randn(rows, 128256, device="cuda", generator=g).bfloat16()
    for t in softmax_top2(x): h.update(t.cpu().numpy().tobytes())
print(h.hexdigest())

"""router_margin: oracle against plain Python, and the jit body against the oracle.

Without a GPU the jit body runs in Triton's interpreter, which has to be chosen before the
kernel is imported: `python test/test_kernels_router.py` runs every check in CHECKS on the CPU and
prints one JSON object. With a GPU the same checks run on it as well.
"""

import json
import math

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from jit_bodies import captured, checks_in, hopper_ptx, jit_tests, needs_gpu, run_checks

from margingate_kernels import Routing, router_margin, router_margin_reference, router_triton
from margingate_kernels.router import launch_router_margin

NAN, INF = math.nan, math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCORINGS = ("softmax", "sigmoid")
# Experts and routing: Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2, -V3, and odd ones.
SHAPES = (
    (8, Routing(2)),
    (60, Routing(4)),
    (128, Routing(8)),
    (160, Routing(6, groups=8, chosen_groups=3)),
    (256, Routing(8, "sigmoid", groups=8, chosen_groups=4)),
    (1, Routing(1)),
    (7, Routing(7)),
    (512, Routing(10)),
    (21, Routing(5, groups=3, chosen_groups=2)),
    (9, Routing(6, groups=3, chosen_groups=2)),
)


def assert_same_bits(got: torch.Tensor, want: torch.Tensor, note: object = "") -> None:
    """NaN of any payload is equal to NaN, and 0.0 not to -0.0."""
    same = torch.equal(got.isnan(), want.isnan())
    same &= torch.equal(*(x.masked_fill(x.isnan(), 1.0).view(torch.int32) for x in (got, want)))
    assert same, (note, got, want)


def run_body(
    logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The jit body on any device, past the dispatch that gives CPU tensors to the oracle."""
    out = torch.full((len(logits),), -77.0, device=logits.device)
    return launch_router_margin(logits, routing, out, bias, reset=True)


def random_logits(rows: int, experts: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rows + experts)
    return (3.0 * torch.randn(rows, experts, generator=generator)).to(dtype).to(device)


def random_bias(experts: int, device: str) -> torch.Tensor:
    return 0.3 * torch.randn(experts, generator=torch.Generator().manual_seed(experts)).to(device)


# ---- checks of the jit body; each takes the device --------------------------------------------


def check_random(device: str) -> None:
    for experts, routing in SHAPES:
        for dtype in DTYPES:
            logits = random_logits(3, experts, dtype, device)
            want = router_margin_reference(logits, routing)
            assert_same_bits(run_body(logits, routing), want, (experts, routing, dtype))


def check_biased(device: str) -> None:
    for experts, shape in SHAPES:
        for scoring in SCORINGS:
            routing = shape._replace(scoring=scoring)
            logits = random_logits(3, experts, torch.float32, device)
            bias = random_bias(experts, device)
            if scoring == "softmax":
                bias = bias.bfloat16()
            want = router_margin_reference(logits, routing, bias=bias)
            assert_same_bits(run_body(logits, routing, bias), want, (experts, routing))


def check_bias_of_each_row(device: str) -> None:
    logits, bias = (random_logits(rows, 12, torch.float32, device)[:4] for rows in (4, 5))
    got = run_body(logits, Routing(3), bias)
    for row in range(4):
        want = router_margin_reference(logits[row : row + 1], Routing(3), bias=bias[row])
        assert_same_bits(got[row : row + 1], want, row)


def check_ties(device: str) -> None:
    """Of two, three and all, at the edge, below and above it."""
    logits = torch.arange(12.0).repeat(6, 1)
    logits[0, [8, 7]] = 8.0  # the 4th and the 5th of 12
    logits[1, [9, 8, 7, 2]] = 8.0
    logits[2] = 1.0
    logits[3, [10, 9]] = 10.0  # both chosen
    logits[4, [3, 2]] = 3.0  # neither
    for dtype in DTYPES:
        got = run_body(logits.to(dtype).to(device), Routing(4))
        assert got.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    flat = torch.zeros(2, 12, device=device)
    flat[1, ::2] = -0.0
    for bias in (None, torch.zeros(12, device=device)):
        for routing in (Routing(4), Routing(4, groups=3, chosen_groups=2)):
            assert_same_bits(run_body(flat, routing, bias), torch.zeros(2, device=device))


def check_groups(device: str) -> None:
    """Four groups of three, two chosen, two experts: what is near is a group or an expert."""
    rows = [
        ([9, 0, 0, 5, 0, 0, 4, 0, 0, 1, 0, 0], 1.0, 1.0),  # groups 5 and 4; experts 5 and 0
        ([9, 0, 0, 8, 7.5, 0, 1, 0, 0, 1, 0, 0], 0.5, 0.5),  # experts 8 and 7.5
        ([9, 8, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0], 0.0, 0.0),  # groups tie
        # By their best, groups are 6, 5.25, 5; by their two best, 6, 5.25, 9.
        ([6, 0, 0, 5.25, 0, 0, 5, 4, 0, 0, 0, 0], 0.25, 0.75),
    ]
    logits = torch.tensor([row for row, *_ in rows], device=device)
    routing = Routing(2, groups=4, chosen_groups=2)
    assert run_body(logits, routing).tolist() == [plain for _, plain, _ in rows]
    zeros = torch.zeros(4, 12, device=device)  # so that a bias of each row decides
    sigmoid = routing._replace(scoring="sigmoid")
    assert run_body(zeros, sigmoid, logits).tolist() == [biased for *_, biased in rows]


def check_few_distinct_values(device: str) -> None:
    """Ties everywhere, among NaN and infinities too; in some rows one value prevails."""
    pool = torch.tensor([-INF, NAN, -3.0, -0.0, 0.0, 1.0, INF])
    for experts, routing in SHAPES:
        generator = torch.Generator().manual_seed(experts)
        shares = torch.rand(6, 7, generator=generator) ** 6
        shares[::2, 1] = 0.0  # else all large rows have a NaN
        choice = torch.multinomial(shares, experts, True, generator=generator)
        logits = pool[choice].to(device)
        for bias in (None, random_bias(experts, device).round()):
            want = router_margin_reference(logits, routing, bias=bias)
            assert_same_bits(run_body(logits, routing, bias), want, (experts, routing))


def check_stated_special_rows(device: str) -> None:
    logits = [[-INF, 2.0, 1.0], [-INF, -INF, 1.0], [INF, 0.0, INF], [INF, INF, INF], [NAN, 1, 0]]
    got = run_body(torch.tensor(logits, device=device), Routing(2))
    assert str(got.tolist()) == "[inf, nan, inf, nan, nan]"
    whole = run_body(torch.tensor([[1.0, -INF], [1.0, NAN]], device=device), Routing(2))
    assert str(whole.tolist()) == "[inf, nan]"


def check_folds(device: str) -> None:
    """The minimum of all layers since the reset; NaN stays until the next one."""
    layers = [random_logits(rows, 20, torch.bfloat16, device)[:4] for rows in (4, 5, 6)]
    layers[1][2, 7] = NAN
    out = torch.full((6,), -77.0, device=device)
    for i, logits in enumerate(layers):
        assert launch_router_margin(logits, Routing(3), out, None, reset=i == 0) is out
    margins = torch.stack([router_margin_reference(logits, Routing(3)) for logits in layers])
    assert_same_bits(out[:4], margins.amin(0))
    assert out[2].isnan() and out[4:].tolist() == [-77.0, -77.0]
    launch_router_margin(layers[0], Routing(3), out, None, reset=True)
    assert_same_bits(out[:4], margins[0])


def check_rows_are_independent(device: str) -> None:
    logits, bias = random_logits(5, 60, torch.bfloat16, device), random_bias(60, device)
    for routing in (Routing(4), Routing(4, groups=6, chosen_groups=2)):
        whole = run_body(logits, routing, bias)
        for row in range(5):
            assert_same_bits(run_body(logits[row : row + 1], routing, bias), whole[row : row + 1])
        others = torch.full_like(logits, NAN)
        others[3] = logits[1]
        assert_same_bits(run_body(others, routing, bias)[3:4], whole[1:2])


def check_views(device: str) -> None:
    """Row strides, stride 0, and an odd address."""
    wide = random_logits(4, 99, torch.bfloat16, device)
    for view in (wide[:, :60], wide[::2, 3:], wide[:1].expand(3, -1), wide[:, 1:98]):
        assert_same_bits(run_body(view, Routing(4)), router_margin_reference(view, Routing(4)))
    assert len(run_body(wide[:0], Routing(4))) == 0


CHECKS = checks_in(globals())


# ---- the jit body ------------------------------------------------------------------------------


interpreted, test_jit_body_in_interpreter, test_jit_body_on_gpu = jit_tests(CHECKS, __file__)


@needs_gpu
def test_replays_in_a_cuda_graph() -> None:
    layers = [random_logits(rows, 128, torch.bfloat16, "cuda")[:4] for rows in (4, 5)]
    out = torch.empty(4, device="cuda")

    def step() -> None:
        for i, logits in enumerate(layers):
            router_margin(logits, Routing(8), out, reset=i == 0)

    graph = captured(step)
    for logits in layers:
        logits.copy_(logits.flip(0))
    graph.replay()
    want = [router_margin_reference(logits, Routing(8)) for logits in layers]
    assert_same_bits(out, torch.minimum(*want))


@pytest.mark.parametrize("scoring", [0, 1, 2])
@pytest.mark.parametrize(("experts", "groups", "chosen"), [(8, 1, 1), (160, 8, 3), (512, 1, 1)])
def test_jit_body_compiles_for_hopper(scoring: int, experts: int, groups: int, chosen: int) -> None:
    """Without a GPU: what the interpreter accepts the compiler may not."""
    width = experts // groups
    constants = {
        "k": 6,
        "scoring": scoring,
        "groups": groups,
        "chosen_groups": chosen,
        "width": width,
        "padded_groups": triton.next_power_of_2(groups),
        "padded_width": triton.next_power_of_2(width),
        "reset": False,
        "overlap": True,
    }
    strides = {"row_stride": "i32", "bias_stride": "i32"}
    pointers = {"logits": "*bf16", "bias": "*fp32", "out": "*fp32"}
    ptx = hopper_ptx(router_triton.fold_margins, pointers | strides, constants, 1)
    assert "bar.sync" not in ptx  # one warp
    assert ("redux.sync" in ptx) == (experts > 8)  # fewer than a warp have other instructions
    assert ptx.index("griddepcontrol.wait") < ptx.index("ld.global")


# ---- the oracle --------------------------------------------------------------------------------

LOGIT = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, INF, -INF, NAN]),
    st.floats(-1e4, 1e4, width=32),
)


def naive_edge(scores: list[float], k: int) -> float:
    """From the k-th of them to the next."""
    if k == len(scores):
        return INF
    best = sorted(scores, reverse=True)
    last, first_out = best[k - 1], best[k]
    return NAN if last == first_out and math.isinf(last) else last - first_out + 0.0


def naive_margin(row: list[float], routing: Routing) -> float:
    """The contract without a bias, in plain Python."""
    if any(math.isnan(x) for x in row):
        return NAN
    width = len(row) // routing.groups
    groups = [row[i : i + width] for i in range(0, len(row), width)]
    groups.sort(key=max, reverse=True)
    near = naive_edge([max(group) for group in groups], routing.chosen_groups)
    rest = naive_edge([x for g in groups[: routing.chosen_groups] for x in g], routing.k)
    return NAN if math.isnan(near) or math.isnan(rest) else min(near, rest)


@st.composite
def routed_rows(draw: st.DrawFn) -> tuple[list[float], Routing]:
    groups, width = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    row = draw(st.lists(LOGIT, min_size=groups * width, max_size=groups * width))
    chosen = draw(st.integers(1, groups))
    return row, Routing(draw(st.integers(1, chosen * width)), groups=groups, chosen_groups=chosen)


@settings(max_examples=400, deadline=None)
@given(routed_rows(), st.sampled_from(DTYPES))
def test_oracle_matches_plain_python(
    drawn: tuple[list[float], Routing], dtype: torch.dtype
) -> None:
    row, routing = drawn
    logits = torch.tensor([row]).to(dtype)
    want = torch.tensor([naive_margin(logits[0].tolist(), routing)])
    got = router_margin_reference(logits, routing)
    assert_same_bits(got, want if not tied_groups(logits, routing) else got)
    if tied_groups(logits, routing):  # then which groups are taken is open, and the margin is not
        assert got.item() == 0.0 or got.isnan()


def tied_groups(logits: torch.Tensor, routing: Routing) -> bool:
    best = sorted(logits.view(routing.groups, -1).max(1).values.tolist(), reverse=True)
    cut = routing.chosen_groups
    return cut < len(best) and best[cut - 1] == best[cut]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-30, 30), st.floats(-1, 1)), min_size=3, max_size=9),
    st.sampled_from(SCORINGS),
)
def test_biased_oracle_matches_plain_python(rows: list[tuple[float, float]], scoring: str) -> None:
    logits, bias = torch.tensor([[x for x, _ in rows]]), torch.tensor([b for _, b in rows])
    values = logits[0].tolist()
    total = math.fsum(math.exp(x) for x in values)
    score = {"sigmoid": lambda x: 1 / (1 + math.exp(-x)), "softmax": lambda x: math.exp(x) / total}
    scores = [score[scoring](x) + b for x, b in zip(values, bias.tolist(), strict=True)]
    got = router_margin_reference(logits, Routing(2, scoring), bias=bias).item()
    assert got == pytest.approx(naive_edge(scores, 2), abs=5e-7)


def test_the_choice_is_that_of_sglang() -> None:
    """What `router_margin` calls chosen is what SGLang's routers choose, bias and groups too."""
    from sglang.srt.layers.moe import topk

    logits, bias = random_logits(64, 32, torch.float32, "cpu"), random_bias(32, "cpu")
    shape = {"num_expert_group": 4, "topk_group": 2, "renormalize": False}
    plain = topk.fused_topk_torch_native(logits, logits, 4, False)
    biased = topk.fused_topk_torch_native(logits, logits, 4, False, bias, "sigmoid")
    grouped = topk.grouped_topk_gpu.__wrapped__(logits, logits, 4, **shape)
    both = topk.biased_grouped_topk_impl.__wrapped__(logits, logits, bias, 4, **shape)
    in_groups = Routing(4, "sigmoid", 4, 2)
    for (_, ids), routing, added in (
        (plain, Routing(4), None),
        (biased, Routing(4, "sigmoid"), bias),
        (grouped, Routing(4, groups=4, chosen_groups=2), None),
        (both, in_groups, bias),
    ):
        assert_decides(logits, ids, routing, added)


def assert_decides(
    logits: torch.Tensor, ids: torch.Tensor, routing: Routing, bias: torch.Tensor | None
) -> None:
    """The margin is the lesser of what the chosen experts and their groups are ahead by."""
    scores = logits if bias is None else logits.sigmoid() + bias
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, ids.long(), True)
    ahead, inside = groups_chosen(scores, routing, two=bias is not None)
    assert not (chosen & ~inside).any()
    least = scores.masked_fill(~chosen, INF).amin(1)
    most = scores.masked_fill(chosen | ~inside, -INF).amax(1)
    want = torch.minimum(least - most, ahead)
    assert torch.allclose(router_margin_reference(logits, routing, bias=bias), want, 0, 5e-7)


def groups_chosen(
    scores: torch.Tensor, routing: Routing, *, two: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the last chosen group is ahead by, [R], and which experts may be chosen, [R, E]."""
    groups, cut = routing.groups, routing.chosen_groups
    best = scores.view(len(scores), groups, -1).sort(2, descending=True).values
    ranks = best[..., : 2 if two else 1].sum(2).sort(1, descending=True)
    inside = torch.zeros(len(scores), groups, dtype=torch.bool)
    inside.scatter_(1, ranks.indices[:, :cut], True)
    ahead = ranks.values[:, cut - 1] - ranks.values[:, cut] if cut < groups else torch.tensor(INF)
    return ahead, inside.repeat_interleave(scores.shape[1] // groups, 1)


def test_cpu_dispatch_folds() -> None:
    logits = random_logits(2, 16, torch.bfloat16, "cpu")
    logits[1, 0] = NAN
    want = router_margin_reference(logits, Routing(2))
    out = torch.tensor([0.0, 0.0, 5.0])
    assert router_margin(logits, Routing(2), out) is out
    assert str(out.tolist()) == "[0.0, nan, 5.0]"
    assert_same_bits(router_margin(logits, Routing(2), out, reset=True)[:2], want)
    for routing in (Routing(2), Routing(2, groups=4, chosen_groups=2)):
        assert len(router_margin_reference(logits[:0], routing)) == 0


# ---- errors ------------------------------------------------------------------------------------

LOGITS, OUT = torch.zeros(2, 8), torch.zeros(2)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"logits": [[1.0]]}, TypeError, "logits is a list"),
        ({"logits": LOGITS.double()}, TypeError, "torch.float64; cast to"),
        ({"logits": LOGITS[0]}, ValueError, r"shape \[8\]"),
        ({"logits": torch.zeros(1, 1025)}, ValueError, "1 to 1024 experts"),
        ({"logits": LOGITS.t()}, ValueError, r"stride 8 along .* logits.contiguous\(\)"),
        ({"logits": LOGITS.to("meta")}, ValueError, "on meta; move it"),
        ({"routing": 2}, TypeError, "routing is a int"),
        ({"routing": Routing(0)}, ValueError, "routing.k is 0; pass 1 to 8"),
        ({"routing": Routing(9)}, ValueError, "routing.k is 9"),
        ({"routing": Routing(5, groups=2)}, ValueError, "routing.k is 5; pass 1 to 4"),
        ({"routing": Routing(1, "tanh")}, ValueError, "routing.scoring is 'tanh'"),
        ({"routing": Routing(1, groups=3)}, ValueError, "divisor of 8 experts"),
        ({"routing": Routing(1, groups=2, chosen_groups=3)}, ValueError, "pass 1 to 2"),
        ({"routing": Routing(1, groups=8), "bias": LOGITS[0]}, ValueError, "two best"),
        ({"out": 1.0}, TypeError, "out is a float"),
        ({"out": OUT.double()}, TypeError, "out has dtype torch.float64"),
        ({"out": OUT.to("meta")}, ValueError, "out is on meta"),
        ({"out": OUT[:1]}, ValueError, r"out has shape \[1\]"),
        ({"out": torch.zeros(4)[::2]}, ValueError, "contiguous"),
        ({"bias": 1.0}, TypeError, "bias is a float"),
        ({"bias": torch.zeros(8, dtype=torch.int32)}, TypeError, "bias has dtype torch.int32"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias has shape \[7\]; pass \[8\]"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias is on meta"),
        ({"bias": torch.zeros(16)[::2]}, ValueError, r"bias.contiguous\(\)"),
    ],
)
def test_errors(changed: dict, error: type[Exception], message: str) -> None:
    arguments = {"logits": LOGITS, "routing": Routing(2), "out": OUT, **changed}
    with pytest.raises(error, match=message):
        router_margin(**arguments)


if __name__ == "__main__":
    print(json.dumps(run_checks(CHECKS, router_triton.fold_margins)))

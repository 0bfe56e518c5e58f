"""softmax_top2: oracle against plain Python, and the jit body against the oracle.

Without a GPU the jit body runs in Triton's interpreter, which has to be chosen before the
kernel is imported: `python test/test_kernels_top2.py` runs every check in CHECKS on the CPU and
prints one JSON object. With a GPU the same checks run on it as well.
"""

import json
import math
import re

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from jit_bodies import (
    captured,
    checks_in,
    hopper_ptx,
    jit_tests,
    needs_gpu,
    run_checks,
)

from margingate_kernels import (
    Top2,
    Top2Workspace,
    empty_top2,
    softmax_top2,
    softmax_top2_reference,
    top2_triton,
    top2_workspace,
)
from margingate_kernels.top2 import launch_top2

NAN, INF = math.nan, math.inf
PART = top2_triton.PART
BLOCK = top2_triton.WARPS * PART  # columns of one program
VOCABS = (1, 2, 7, 100, PART + 8, BLOCK - 1, BLOCK, BLOCK + 1, 49152)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ATOL, RTOL = 2e-6, 4e-7  # of logprob, as softmax_top2_reference states


def bits(result: Top2) -> list[torch.Tensor]:
    """Comparable with torch.equal also where NaN (of any payload) and signed zeros are."""
    floats = [f.masked_fill(f.isnan(), -1.0).view(torch.int32) for f in result[2:]]
    return [*result[:2], *floats, result.margin.isnan(), result.logprob.isnan()]


def assert_same_bits(got: Top2, want: Top2, note: object = "") -> None:
    for a, b in zip(bits(got), bits(want), strict=True):
        assert torch.equal(a, b), (note, got, want)


def assert_matches_oracle(got: Top2, want: Top2, note: object = "") -> None:
    """Ids and margin bit for bit, logprob within the stated tolerance."""
    neutral = torch.zeros_like(want.logprob)
    assert_same_bits(got._replace(logprob=neutral), want._replace(logprob=neutral), note)
    close = torch.allclose(got.logprob, want.logprob, rtol=RTOL, atol=ATOL, equal_nan=True)
    assert close, (note, got.logprob, want.logprob)


def run_body(logits: torch.Tensor, valid_vocab: int | None = None) -> Top2:
    """The jit body on any device, past the dispatch that gives CPU tensors to the oracle."""
    return launch_top2(logits, None, None, valid_vocab or logits.shape[1])


def random_logits(rows: int, vocab: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rows + vocab)
    logits = 6.0 * torch.randn(rows, vocab, generator=generator)
    return logits.to(dtype).to(device)


def tied_rows(vocab: int, groups: list[list[int]]) -> torch.Tensor:
    """One row of noise below 1 per group, with the group's columns all at 5."""
    logits = torch.rand(len(groups), vocab, generator=torch.Generator().manual_seed(vocab))
    for row, group in enumerate(groups):
        logits[row, group] = 5.0
    return logits


# ---- checks of the jit body; each takes the device --------------------------------------------


def check_random(device: str) -> None:
    for vocab in VOCABS:
        for dtype in DTYPES:
            if vocab == 49152 and dtype != torch.bfloat16 and device == "cpu":
                continue  # the interpreter is slow
            logits = random_logits(3, vocab, dtype, device)
            assert_matches_oracle(run_body(logits), softmax_top2_reference(logits), (vocab, dtype))


def check_ties(device: str) -> None:
    edge = [BLOCK - 1, BLOCK]
    groups = [[0, 1], edge, [BLOCK, 2 * BLOCK], [0, 3 * BLOCK], [7, BLOCK - 1, BLOCK], [3, 4, 5]]
    groups += [[BLOCK + 1, 3 * BLOCK + 1, 3 * BLOCK + 2], [3 * BLOCK + 8, 3 * BLOCK + 9]]
    logits = tied_rows(3 * BLOCK + 10, groups).to(device)
    assert_finds_ties(logits, groups)


def check_ties_within_a_part(device: str) -> None:
    """In one group, in one lane, in other lanes of the same or another step, in other warps."""
    for dtype in (torch.float32, torch.bfloat16):
        group = 16 // dtype.itemsize
        step = 32 * group  # columns that a warp reads at once
        groups = [[0, 1], [group - 1, group], [2, step + 1], [1, 2 * step, 3 * step]]
        groups += [[step - 1, step], [group, step], [3 * group, step + group, step + 3 * group]]
        groups += [[2 * step, 2 * step + 1], [PART - 1, PART], [PART - step, PART, 2 * PART]]
        for vocab in (BLOCK, BLOCK - 1):  # the second reads column by column
            assert_finds_ties(tied_rows(vocab, groups).to(dtype).to(device), groups)


def assert_finds_ties(logits: torch.Tensor, groups: list[list[int]]) -> None:
    got = run_body(logits)
    assert got.ids.tolist() == [g[0] for g in groups]
    assert got.runner_up.tolist() == [g[1] for g in groups]
    assert got.margin.tolist() == [0.0] * len(groups)
    assert_matches_oracle(got, softmax_top2_reference(logits))


def check_few_distinct_values(device: str) -> None:
    """Ties everywhere, among NaN and infinities too; in some rows one value prevails."""
    pool = torch.tensor([-INF, NAN, -3.0, -0.0, 0.0, 1.0, INF])
    for vocab in (1, 5, 12, 1000, BLOCK + 8):
        generator = torch.Generator().manual_seed(vocab)
        choice = torch.multinomial(torch.rand(8, 7, generator=generator) ** 6, vocab, True)
        for dtype in (torch.float32, torch.bfloat16):
            logits = pool[choice].to(dtype).to(device)
            assert_matches_oracle(run_body(logits), softmax_top2_reference(logits), (vocab, dtype))


def check_flat_rows(device: str) -> None:
    """Every logit equal, and signed zeros, which are equal too."""
    for vocab in (2, 100, 2 * BLOCK + 1):
        zeros = torch.zeros(3, vocab, device=device)
        zeros[1, 0], zeros[2, 1:] = -0.0, -0.0
        got = run_body(zeros)
        assert got.ids.tolist() == [0] * 3
        assert got.runner_up.tolist() == [1] * 3
        assert_matches_oracle(got, softmax_top2_reference(zeros))


def check_runner_up_places(device: str) -> None:
    """Second best before or after the best, in its block or another."""
    best = [5, 5, 5, BLOCK + 5, BLOCK + 5, 2 * BLOCK, 0]
    second = [4, 6, 2 * BLOCK, 4, BLOCK + 4, BLOCK - 1, 2 * BLOCK + 2]
    logits = tied_rows(2 * BLOCK + 3, [[b] for b in best])
    logits[torch.arange(len(best)), second] = 4.5
    got = run_body(logits.to(device))
    assert (got.ids.tolist(), got.runner_up.tolist()) == (best, second)
    assert got.margin.tolist() == [0.5] * len(best)


def check_special_values(device: str) -> None:
    """NaN, -inf and +inf at either end of the row and alone in a block."""
    cases = [(vocab, torch.float32) for vocab in (1, 2, 7, BLOCK, 2 * BLOCK + 1)]
    for vocab, dtype in [*cases, (100, torch.bfloat16), (100, torch.float16)]:
        logits = special_rows(vocab).to(dtype).to(device)
        got = run_body(logits)
        assert_matches_oracle(got, softmax_top2_reference(logits), (vocab, dtype))
        assert ((got.ids >= 0) & (got.ids < vocab)).all()
        assert got.margin[logits.isnan().any(1)].isnan().all()
        assert got.logprob[logits.isnan().any(1)].isnan().all()


def special_rows(vocab: int) -> torch.Tensor:
    """Each once: in a small vocabulary several are the same."""
    rows = []
    for value in (NAN, -INF, INF):
        everywhere = torch.full((vocab,), value)
        one_finite = everywhere.clone()
        one_finite[vocab // 2] = 3.0
        rows += [everywhere, one_finite]
        for columns in ([0], [-1], [0, -1], slice(BLOCK, None), slice(0, BLOCK)):
            row = torch.linspace(-300.0, 300.0, vocab)
            row[columns] = value
            rows.append(row)
    rows.append(torch.where(torch.arange(vocab) % 2 == 0, -INF, NAN))
    rows.append(torch.where(torch.arange(vocab) % 2 == 0, INF, -INF))
    return torch.stack(list({row.numpy().tobytes(): row for row in rows}.values()))


def check_many_parts(device: str) -> None:
    """More parts than the merging warp has lanes."""
    vocab = 9 * BLOCK + 16
    groups = [[BLOCK - 1, BLOCK], [2 * BLOCK, 9 * BLOCK], [PART, 33 * PART, 9 * BLOCK + 15]]
    logits = torch.cat([tied_rows(vocab, groups), special_rows(vocab)[::3]]).to(device)
    assert top2_triton.part_count(vocab) == 40
    assert_matches_oracle(run_body(logits), softmax_top2_reference(logits))


def check_rows_are_independent(device: str) -> None:
    """The bits of a row, logprob included, whatever is around it and however many rows."""
    for vocab in (7, BLOCK + 1, 2 * BLOCK + 8 if device == "cpu" else 49152):
        logits = random_logits(5, vocab, torch.bfloat16, device)
        whole = run_body(logits)
        for row in range(5):
            mine = Top2(*(field[row : row + 1] for field in whole))
            assert_same_bits(run_body(logits[row : row + 1]), mine, (vocab, row))
            assert_same_bits(run_body(logits[row : row + 1].clone()), mine, (vocab, row))
        others = torch.full_like(logits, NAN)
        others[3] = logits[1]
        among = Top2(*(field[3:4] for field in run_body(others)))
        assert_same_bits(among, Top2(*(field[1:2] for field in whole)), vocab)


def check_views_and_padding(device: str) -> None:
    """Row strides, stride 0, an odd address, and padded columns that hold anything."""
    wide = random_logits(4, BLOCK + 40, torch.float32, device)
    for view in (wide[:, :100], wide[::2, 3:], wide[:1].expand(3, -1), wide[:, 1 : BLOCK + 1]):
        assert_matches_oracle(run_body(view), softmax_top2_reference(view))
    for valid in (1, 99, 100, PART + 1, BLOCK, BLOCK + 1):
        padded = wide.clone()
        padded[:, valid:] = NAN
        padded[1, valid:] = INF
        want = softmax_top2_reference(wide[:, :valid])
        assert_matches_oracle(run_body(padded, valid), want, valid)
        assert_same_bits(softmax_top2_reference(padded, valid_vocab=valid), want, valid)


def check_buffers(device: str) -> None:
    """`out` is returned, a workspace may be larger than needed, and no row is fine."""
    logits = random_logits(3, BLOCK + 1, torch.bfloat16, device)
    out, workspace = empty_top2(3, device), top2_workspace(8, BLOCK + 1, device)
    for buffer in workspace:
        buffer.fill_(-77)
    assert launch_top2(logits, out, workspace, BLOCK + 1) is out
    assert_same_bits(out, run_body(logits))
    for buffer in workspace:
        assert (buffer[3:] == -77).all()
    assert [len(field) for field in run_body(logits[:0])] == [0] * 4


def check_again(device: str) -> None:
    """From the second launch on, Triton is not asked what it compiled."""
    for vocab in (BLOCK, BLOCK + 1, BLOCK):
        for rows in (1, 2):
            logits = random_logits(rows, vocab, torch.bfloat16, device)
            for each in (logits, logits.flip(1), logits.float()):
                assert_matches_oracle(run_body(each), softmax_top2_reference(each), vocab)


CHECKS = checks_in(globals())


# ---- the jit body ------------------------------------------------------------------------------


interpreted, test_jit_body_in_interpreter, test_jit_body_on_gpu = jit_tests(CHECKS, __file__)


@needs_gpu
def test_replays_in_a_cuda_graph() -> None:
    logits = random_logits(4, 49152, torch.bfloat16, "cuda")
    out, workspace = empty_top2(4, "cuda"), top2_workspace(4, 49152, "cuda")
    graph = captured(lambda: softmax_top2(logits, out, workspace))
    logits.copy_(logits.flip(1))
    graph.replay()
    assert_same_bits(out, softmax_top2(logits))


@pytest.mark.parametrize(
    ("vocab", "group"),
    [(7, 1), (8, 8), (32000, 8), (49152, 8), (128256, 8), (128256, 1), (152064, 8)],
)
def test_jit_bodies_compile_for_hopper(vocab: int, group: int) -> None:
    """Without a GPU: what the interpreter accepts the compiler may not."""
    parts = top2_triton.part_count(vocab)
    plan = {"valid_vocab": vocab, "parts": parts, "group": group, "overlap": True}
    pointers = {"logits": "*bf16", "row_stride": "i32", "values": "*fp32", "ids": "*i32"}
    steps, warps = top2_triton.COLUMNS_PER_LANE // group, top2_triton.WARPS
    scan = hopper_ptx(
        top2_triton.scan_parts,
        pointers,
        {"vocab": vocab, **plan, "steps": steps, "warps": warps},
        warps,
    )
    loads = re.findall(r"ld\.global\S*", scan)
    assert all("evict_first" in load for load in loads)
    assert any(".v4." in load for load in loads) == (group > 1)
    assert "bar.sync" not in scan  # each warp has its part to itself
    assert scan.index("griddepcontrol.wait") < scan.index("ld.global")
    assert "griddepcontrol.launch_dependents" in scan
    out = {
        "out_ids": "*i64",
        "out_runner_up": "*i64",
        "out_margin": "*fp32",
        "out_logprob": "*fp32",
    }
    padded = {"padded_parts": triton.next_power_of_2(parts)}
    merge = hopper_ptx(top2_triton.merge_parts, {**pointers, **out}, {**plan, **padded}, 1)
    assert merge.index("griddepcontrol.wait") < merge.index("ld.global")


@given(st.integers(1, 2**22))
def test_parts_cover_the_vocabulary(vocab: int) -> None:
    parts = top2_triton.part_count(vocab)
    assert parts % top2_triton.WARPS == 0
    assert parts * PART - BLOCK < vocab <= parts * PART


# ---- the oracle --------------------------------------------------------------------------------

LOGIT = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, INF, -INF, NAN]),
    st.floats(-1e4, 1e4, width=32),
)


def naive_top2(row: list[float]) -> tuple[int, int, float, float]:
    """The contract in plain Python, in float64."""
    ranked = [-INF if math.isnan(x) else x for x in row]
    order = sorted(range(len(row)), key=lambda i: (-ranked[i], i))
    best = ranked[order[0]]
    second = ranked[order[1]] if len(row) > 1 else -INF
    runner_up = order[1] if len(row) > 1 else -1
    if any(math.isnan(x) for x in row):
        return order[0], runner_up, NAN, NAN
    margin = NAN if best == second and math.isinf(best) else best - second + 0.0
    if math.isinf(best):
        return order[0], runner_up, margin, NAN
    return order[0], runner_up, margin, -math.log(math.fsum(math.exp(x - best) for x in row))


@settings(max_examples=300, deadline=None)
@given(st.lists(LOGIT, min_size=1, max_size=12), st.sampled_from(DTYPES))
def test_oracle_matches_plain_python(row: list[float], dtype: torch.dtype) -> None:
    logits = torch.tensor([row]).to(dtype)
    got = softmax_top2_reference(logits)
    ids, runner_up, margin, logprob = naive_top2(logits[0].tolist())
    want = torch.tensor([margin]), torch.tensor([logprob])
    assert (got.ids.item(), got.runner_up.item()) == (ids, runner_up)
    assert_matches_oracle(got, Top2(got.ids, got.runner_up, *want))


@pytest.mark.parametrize("vocab", [7, 4097, 49152])
def test_oracle_rows_are_independent(vocab: int) -> None:
    logits = random_logits(9, vocab, torch.float32, "cpu")
    whole = softmax_top2_reference(logits)
    for row in range(9):
        mine = Top2(*(field[row : row + 1] for field in whole))
        assert_same_bits(softmax_top2_reference(logits[row : row + 1]), mine, row)
        assert_same_bits(softmax_top2_reference(logits[row : row + 1].clone()), mine, row)


def test_stated_special_rows() -> None:
    rows = torch.tensor([[-INF, 2.0], [-INF, -INF], [INF, 0.0], [INF, INF], [NAN, 1.0]])
    got = softmax_top2(rows)
    assert got.ids.tolist() == [1, 0, 0, 0, 1]
    assert got.runner_up.tolist() == [0, 1, 1, 1, 0]
    assert str(got.margin.tolist()) == "[inf, nan, inf, nan, nan]"
    assert str(got.logprob.tolist()) == "[0.0, nan, nan, nan, nan]"
    alone = softmax_top2(torch.tensor([[3.0]]))
    assert [field.item() for field in alone] == [0, -1, INF, 0.0]


def test_cpu_dispatch_fills_out() -> None:
    logits = random_logits(2, 100, torch.float16, "cpu")
    out = empty_top2(2, "cpu")
    assert softmax_top2(logits, out, top2_workspace(2, 100, "cpu")) is out
    assert_same_bits(out, softmax_top2_reference(logits))
    assert [field.dtype for field in out] == [torch.int64] * 2 + [torch.float32] * 2
    assert [len(field) for field in softmax_top2(logits[:0])] == [0] * 4


# ---- errors ------------------------------------------------------------------------------------

LOGITS = torch.zeros(2, 8)
OUT = empty_top2(2, "cpu")
WORKSPACE = top2_workspace(2, 8, "cpu")


@pytest.mark.parametrize(
    ("logits", "keywords", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "logits is a list"),
        (LOGITS.double(), {}, TypeError, "torch.float64; cast to"),
        (LOGITS[0], {}, ValueError, r"shape \[8\]"),
        (LOGITS[:, :0], {}, ValueError, r"shape \[2, 0\]"),
        (LOGITS.t(), {}, ValueError, r"stride 8 along .* logits.contiguous\(\)"),
        (LOGITS.to("meta"), {}, ValueError, "on meta; move it"),
        (LOGITS, {"valid_vocab": 0}, ValueError, "valid_vocab is 0; pass 1 to 8"),
        (LOGITS, {"valid_vocab": 9}, ValueError, "valid_vocab is 9"),
        (LOGITS, {"valid_vocab": 4.0}, TypeError, "valid_vocab is a float"),
        (LOGITS, {"out": tuple(OUT)}, TypeError, "out is a tuple"),
        (LOGITS, {"out": OUT._replace(ids=OUT.ids.int())}, TypeError, "out.ids has dtype"),
        (LOGITS, {"out": empty_top2(3, "cpu")}, ValueError, r"out.ids has shape \[3\]"),
        (LOGITS, {"out": empty_top2(2, "meta")}, ValueError, "out.ids is on meta"),
        (
            LOGITS,
            {"out": OUT._replace(margin=torch.zeros(4)[::2])},
            ValueError,
            "out.margin has strides",
        ),
        (LOGITS, {"workspace": tuple(WORKSPACE)}, TypeError, "workspace is a tuple"),
        (
            LOGITS,
            {"workspace": Top2Workspace(WORKSPACE.values, WORKSPACE.ids.long())},
            TypeError,
            "workspace.ids has dtype",
        ),
        (
            LOGITS,
            {"workspace": top2_workspace(1, 8, "cpu")},
            ValueError,
            r"not at least \[2, 4, 3\]; pass top2_workspace\(2, 8",
        ),
        (
            LOGITS,
            {"workspace": top2_workspace(2, BLOCK + 1, "cpu")},
            ValueError,
            r"workspace.values has shape \[2, 8, 3\]",
        ),
    ],
)
def test_errors(logits: object, keywords: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        softmax_top2(logits, **keywords)  # type: ignore[arg-type]


if __name__ == "__main__":
    print(json.dumps(run_checks(CHECKS, top2_triton.scan_parts)))

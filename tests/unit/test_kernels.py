"""The Triton kernels against the plain references in float64: by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.attention import prefix_attention_reference
from models.attention_inputs import Null, Recency, position_bucket, recency_bucket
from tests.attention import FLAGS, gradients, leaves, problem

pytest.importorskip("triton", reason="Triton has no package for this platform")

import triton
import triton.language as tl

from models.kernels.biases import age_edges, newer_bucket
from models.kernels.prefix_attention import flash_prefix_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 70)), min_size=1, max_size=3)


def moved(given_: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same problem as leaves of `dtype` where the kernel runs; times and offsets as they are."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().to(DEVICE, dtype if x.is_floating_point() else x.dtype)

    out: dict[str, Any] = {}
    for name, value in given_.items():
        if isinstance(value, Recency | Null):
            out[name] = type(value)(*(leaf(x) for x in value))
        else:
            out[name] = leaf(value) if isinstance(value, Tensor) else value
    for x in leaves(out):
        x.requires_grad_()
    return out


def assert_equals_the_reference(given_: dict[str, Any], dtype: torch.dtype, bound: float) -> None:
    ours = moved(given_, dtype)
    want = prefix_attention_reference(**given_)
    got = flash_prefix_attention(**ours)
    assert got.dtype == dtype
    torch.testing.assert_close(got.cpu().double(), want, rtol=bound, atol=bound)
    for a, b in zip(
        gradients(flash_prefix_attention, ours),
        gradients(prefix_attention_reference, given_),
        strict=True,
    ):
        scale = float(b.abs().sum() / max(b.numel(), 1)) + 1.0
        torch.testing.assert_close(a.cpu().double() / scale, b / scale, rtol=bound, atol=bound)


@settings(max_examples=6)
@given(SIZES, FLAGS, st.integers(0, 10**6))
def test_it_equals_the_reference_forward_and_backward(sizes, flags, seed) -> None:
    given_ = problem(sizes, **flags, seed=seed)
    assert_equals_the_reference(given_, torch.float32, 2e-5)


@pytest.mark.parametrize("prefix", ["none", "all"])
def test_empty_rows_one_event_rows_and_whole_prefixes(prefix: str) -> None:
    sizes = [(0, 5), (3, 0), (5, 33), (1, 1), (0, 0), (1, 32)]
    assert_equals_the_reference(problem(sizes, prefix=prefix), torch.float32, 2e-5)


@settings(max_examples=4)
@given(SIZES, FLAGS, st.integers(0, 10**6))
def test_pointwise_weights_equal_the_reference(sizes, flags, seed) -> None:
    given_ = problem(sizes, **flags, pointwise=30.0, seed=seed)
    assert_equals_the_reference(given_, torch.float32, 2e-5)


def test_head_dimensions_and_groups_that_fill_no_tile() -> None:
    for heads, width in (((3, 3), 20), ((6, 2), 5)):
        given_ = problem([(7, 40), (2, 3)], heads=heads, width=width)
        assert_equals_the_reference(given_, torch.float32, 2e-5)


def test_bfloat16_is_as_close_as_bfloat16_is() -> None:
    assert_equals_the_reference(problem([(6, 35), (3, 9)], width=16), torch.bfloat16, 3e-2)


def test_all_but_the_tables_gradients_repeat_to_the_bit() -> None:
    given_ = problem([(9, 50), (4, 7)], recency=False, position=False, null=False)
    one, other = (gradients(flash_prefix_attention, moved(given_, torch.float32)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_batch_without_a_query_or_without_a_key() -> None:
    for sizes in ([(0, 3)], [(2, 0), (1, 0)]):
        assert_equals_the_reference(problem(sizes), torch.float32, 2e-5)


def test_the_edges_of_the_recency_buckets_are_exact() -> None:
    edges = age_edges(torch.device("cpu"))
    for bucket in range(1, 64):
        at = torch.stack([edges[bucket] - 1, edges[bucket]])
        assert recency_bucket(at).tolist() == [bucket - 1, bucket]


@triton.jit
def _buckets(out, most, SIZE: tl.constexpr):
    newer = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + newer, newer_bucket(newer), mask=newer < most)


def test_the_position_buckets_of_the_kernel_are_those_of_the_reference() -> None:
    newer = torch.arange(20_000)
    out = torch.empty_like(newer, device=DEVICE)
    _buckets[(triton.cdiv(len(newer), 1024),)](out, len(newer), SIZE=1024)
    assert torch.equal(out.cpu(), position_bucket(newer))


def test_head_counts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2 key heads"):
        flash_prefix_attention(**problem([(1, 1)], heads=(3, 2)))


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import models.kernels.prefix_attention as p

pointers = {
    "fp32": "lse delta recency d_recency position d_position null_score null_value".split(),
    "i64": "q_offsets kv_offsets kv_end q_time kv_time first_pair edges tile_row tile_start".split(),
    "half": "q k v out d_out d_q d_k d_v pairs d_pairs".split(),
}
values = dict(G=8, H=2, D=16, BM=16, BN=32, BD=16, UPCAST=False, COPIES=64)
variants = [
    (80, "fp32", dict(RECENCY=True, POSITION=True, PAIRS=True, NULL=True, POINTWISE=False)),
    (80, "bf16", dict(RECENCY=True, POSITION=True, PAIRS=False, NULL=False, POINTWISE=True)),
    (90, "bf16", dict(RECENCY=True, POSITION=True, PAIRS=True, NULL=True, POINTWISE=False)),
    (90, "fp32", dict(RECENCY=False, POSITION=False, PAIRS=True, NULL=False, POINTWISE=True)),
]
for capability, dtype, flags in variants:
    for kernel in (p._forward, p._backward_q, p._backward_kv):
        signature = {"scale": "fp32", "share": "fp32"}
        for kind, names in pointers.items():
            for name in names:
                signature[name] = "*" + (dtype if kind == "half" else kind)
        mine = {a: signature.get(a, "constexpr") for a in kernel.arg_names}
        chosen = {a: (values | flags).get(a) for a in kernel.arg_names}
        chosen = {a: v for a, v in chosen.items() if v is not None}
        source = ASTSource(fn=kernel, signature=mine, constexprs=chosen)
        built = compile(source, target=GPUTarget("cuda", capability, 32))
        assert built.asm["cubin"], kernel
print("compiled")
"""


def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.stdout.endswith("compiled\n"), done.stderr[-2000:]

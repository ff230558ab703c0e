"""One call of a plan of csrc/'s GEMM, in the emulator or on a GPU, and the same in fp64."""

from __future__ import annotations

import torch

from fused_peft.backends import extension
from fused_peft.backends.plans import KINDS, Call, Plan
from fused_peft.core.dropout import keep_mask
from fused_peft.tools import verify

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def clusters(plan: Plan) -> tuple[tuple[int, int], ...]:
    """The clusters it runs with, blocks along M and along N."""
    return (1, 1), (2, 1) if plan.BN >= plan.BM else (1, 2)


def _start(plan: Plan, call: Call) -> None:
    extension.call(plan.name, call, not torch.cuda.is_available())


class Gemm:
    """Operands of one call of a plan, what it computes, the same in fp64. vectors: dtype of d_in, d_out and bias."""

    def __init__(self, plan: Plan, M: int, N: int, K: int, R: int, vectors=torch.float32, seed: int = 0, device="cpu"):
        torch.manual_seed(seed)
        self.plan, self.sizes, self.device, dtype = plan, (M, N, K, R), device, DTYPES[plan.dtype]
        draw = lambda *shape: torch.randn(*shape, device=device).to(dtype)  # noqa: E731
        self.x, self.w = draw(M, K), draw(*((K, N) if plan.across else (N, K)))
        self.b, self.a, self.s = draw(N, R), draw(R, K) / K**0.5, draw(M, R)
        self.d_in, self.d_out, self.bias = (torch.randn(n, device=device).to(vectors) for n in (K, N, N))
        self.seed, self.threshold = torch.tensor([77, -3], dtype=torch.int32, device=device), -13000

    def run(
        self, start=_start, cluster=(1, 1), order=0, processors=4, inside=True, vectors=True, want=("y", "z"), group=2
    ):
        (M, N, K, R), plan, dtype = self.sizes, self.plan, self.x.dtype
        y, z, t = (torch.full((M, n), torch.nan, dtype=dtype, device=self.device) for n in (N, N, R))
        of = {"s": self.s} if plan.form != "INLINE" else {"a": self.a, "t": t}
        if plan.form == "SCALED":
            of |= {"d_in": self.d_in, "d_in_kind": KINDS[self.d_in.dtype]}
        if vectors:
            of |= {"d_out": self.d_out, "bias": self.bias}
            of |= {"d_out_kind": KINDS[self.d_out.dtype], "bias_kind": KINDS[self.bias.dtype]}
        of |= {name: out for name, out in (("y", y), ("z", z)) if name in want}
        pairs = ((n, getattr(self, n)) for n in ("x", "w", "s", "b", "a"))
        strides = {f"{n}_stride": operand.stride(0) for n, operand in pairs}
        call = Call(
            x=self.x, w=self.w, b=self.b, seed=self.seed, **of, **strides, M=M, N=N, K=K, R=R, threshold=self.threshold,
            dtype=KINDS[dtype], bias_inside=inside, across=plan.across, cluster_m=cluster[0], cluster_n=cluster[1],
            group=group, processors=processors, seed_of_order=order, stream=self.stream(),
            overlap=plan.form != "INLINE",
        )  # fmt: skip
        start(plan, call)
        found = {"y": y, "z": z} | ({"t": t} if plan.form == "INLINE" else {})
        return {name: out for name, out in found.items() if name == "t" or name in want}

    def stream(self) -> int | None:
        return None if self.device == "cpu" else torch.cuda.current_stream().cuda_stream

    def exact(self, inside=True, vectors=True):
        (M, N, _, _), plan = self.sizes, self.plan
        x, w, b = self.x.double(), self.w.double(), self.b.double()
        if plan.form == "SCALED":
            x = (self.x.float() * self.d_in.float()).to(self.x.dtype).double()
        t = x @ self.a.double().t()
        update = (t.to(self.x.dtype).double() if plan.form == "INLINE" else self.s.double()) @ b.t()
        if plan.form == "MASKED":
            p = (self.threshold + 32768) / 65536
            update *= keep_mask(self.seed, (M, N), p)
        z = x @ (w if plan.across else w.t()) + update
        bias = self.bias.double() if vectors else 0
        z = z + bias if inside else z
        y = z * (self.d_out.double() if vectors else 1)
        return {"y": y if inside else y + bias, "z": z, "t": t}

    def disagreement(self, **options):
        """What is wrong: errors above the limit, or a complaint of the emulator or of CUDA; empty if nothing is."""
        try:
            got = self.run(**options)
        except (RuntimeError, AssertionError) as e:
            return str(e)
        want = self.exact(**{k: v for k, v in options.items() if k in ("inside", "vectors")})
        errors = [((g.double() - want[n]).norm() / want[n].norm()).item() for n, g in got.items()]
        limit = verify.LIMITS[self.x.dtype]
        return "" if all(e <= limit for e in errors) else f"errors {errors}"

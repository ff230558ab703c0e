"""LoRA and DoRA on quantised layers, forward + backward, and what each keeps for backward: the quantiser's layer alone,
PEFT's, ours in its place, and ours on a dense layer of the decoded weight.

    python -m pytest bench/bench_quantised.py --results bench/results/cpu
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from baselines import DTYPES
from clock import compared, spread
from kept import held_by, kept

SHAPES = [(512, 1024, 4096), (2048, 2048, 2048)]  # tokens, in, out
RANK = 16


def fast_bf16() -> bool:
    file = Path("/proc/cpuinfo")
    return file.exists() and bool({"avx512_bf16", "amx_bf16", "bf16"} & set(file.read_text().split()))


def base(kind: str, K: int, N: int, dtype: torch.dtype) -> torch.nn.Module:
    """A layer that bitsandbytes quantised from a random weight: NF4 with nested scales, or LLM.int8."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    W = (torch.randn(N, K) * 0.02).to(dtype)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(W, requires_grad=False, has_fp16_weights=False)
    else:
        options = {"quant_type": "nf4", "compress_statistics": True}
        layer = bnb.nn.Linear4bit(K, N, False, dtype, **options)
        layer.weight = bnb.nn.Params4bit(W, requires_grad=False, module=layer, **options)
    return layer.to("cpu")


def contenders(kind: str, method: str, K: int, N: int, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    import peft

    import fused_peft as fp
    from fused_peft.core import frozen

    torch.manual_seed(0)
    net = torch.nn.Sequential(base(kind, K, N, dtype))
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind != "int8", kind == "int8"
    config = peft.LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False, use_dora=method == "dora")
    dense = torch.nn.Linear(K, N, bias=False, dtype=dtype)
    W = frozen.kind_of(net[0]).matrix(net[0])
    dense.weight.data = frozen.decode(W.spec, W.parts, dtype)
    models = {"frozen": copy.deepcopy(net)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models["peft"] = peft.get_peft_model(net, config)
        models["ours"] = fp.accelerate(copy.deepcopy(models["peft"]))
        models["ours on a dense layer"] = fp.accelerate(peft.get_peft_model(torch.nn.Sequential(dense), config))
    return {name: model.train() for name, model in models.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised(benchmark, in_turn, measured, tiny, kind, method, shape, dtype):
    if dtype == "bf16" and not tiny and not fast_bf16() and (method != "lora" or shape != SHAPES[0]):
        pytest.skip("a step takes minutes on a CPU without bf16 instructions")
    M, K, N = (4, 64, 128) if tiny else shape
    models = contenders(kind, method, K, N, DTYPES[dtype])
    x = torch.randn(M, K, dtype=DTYPES[dtype], requires_grad=True)
    dy = torch.randn(M, N, dtype=DTYPES[dtype])

    def step(model: torch.nn.Module) -> tuple[torch.Tensor, ...]:
        tensors = [x, *(p for p in model.parameters() if p.requires_grad)]
        return torch.autograd.grad(model(x), tensors, dy)

    if kind != "int8":  # of which DoRA in PEFT loses the scales when it is first called
        for got, want in zip(step(models["ours"]), step(models["peft"]), strict=True):
            assert (got - want).float().norm() <= (1e-5 if dtype == "fp32" else 2e-2) * want.float().norm()
    if (kind, method) == ("int8", "dora"):
        del models["peft"]
    seconds = in_turn({name: lambda m=m: step(m) for name, m in models.items()}, "ours")
    benchmark.group = f"{kind} {method} {M} x {K} x {N} {dtype}"
    for who, model in models.items():
        about = {"format": kind, "method": method, "tokens": M, "K": K, "N": N, "r": RANK, "dtype": dtype}
        figures = {**spread("ms", [1e3 * s for s in seconds[who]]), **compared(seconds, who)}
        measured(
            "quantised",
            **about,
            contender=who,
            **figures,
            kept_bytes=kept(lambda model=model: model(x), [x, *held_by(model)]),
        )

"""Mixed precision as training loops use it: autocast, GradScaler, fp32 adapters over half precision, accumulation."""

import copy

import pytest
import torch
from cases import CASES
from torch import nn

import fused_peft as fp

HALF = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]
SURE = [c for c in CASES if "dropout" not in c.name and c.name != "parallel_adapter+all"]  # no dropout
every_case = pytest.mark.parametrize("case", SURE, ids=lambda c: c.name)


def net(case, dtype=torch.float32):
    torch.manual_seed(0)
    config = case.make(3)
    config.target_modules = ["0", "2"]
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6)).to(dtype)
    model = fp.get_peft_model(model, config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    if case.method == "lora_dash":
        fp.on_step(model, 3)  # its directions
    return model


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def gradients(model, x, dtype=None, scale=1.0):
    """Those of a loss in fp32, under autocast to dtype if given."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        y = model(x)
    (y.float().square().mean() * scale).backward()
    found = {n: p.grad / scale for n, p in trained(model).items()}
    model.zero_grad()
    return y, found


@every_case
@pytest.mark.parametrize("dtype", HALF)
def test_autocast_gives_the_half_precision_result(case, dtype):
    """y in autocast's dtype, gradients in the parameters' fp32, both near the fp32 run's."""
    model, x = net(case), torch.randn(16, 8)
    want_y, want = gradients(model, x)
    y, got = gradients(model, x, dtype, scale=64.0)
    assert y.dtype == dtype
    limit = 0.03 if dtype == torch.bfloat16 else 0.004
    whole = torch.cat([g.flatten() for g in want.values()]).norm()
    assert (y - want_y).norm() < limit * want_y.norm()
    for name, g in got.items():
        assert g.dtype == torch.float32
        assert (g - want[name]).norm() < limit * whole, name


@pytest.mark.parametrize("config", [fp.SSBConfig(), fp.IA3Config(scale_bias=False), fp.SSLConfig(), fp.BitFitConfig()])
def test_a_bias_of_another_dtype_does_not_widen_y(config):
    layer = fp.PeftLinear(8, 4, config=config, adapter_dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(3, 8)).dtype == torch.bfloat16


@every_case
@pytest.mark.parametrize("dtype", HALF)
def test_fp32_adapters_on_a_half_precision_base(case, dtype):
    """They stay fp32 through training steps that are too small for the base's dtype to hold."""
    model, x = net(case, dtype), torch.randn(16, 8).to(dtype)
    before = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-5, weight_decay=0)
    for _ in range(2):
        y = model(x)
        assert y.dtype == dtype
        y.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, p), q in zip(trained(model).items(), trained(before).values(), strict=True):
        assert p.dtype == torch.float32
        moved = (p - q).abs().max()
        assert 0 < moved < 1e-4, name


@every_case
def test_grad_scaler(case):
    """Scaled fp16 losses step as unscaled ones do; a step with an infinite gradient is left out, the scale halved."""
    x, models = torch.randn(16, 8), [net(case), net(case)]
    optimizers = [torch.optim.SGD(trained(m).values(), lr=1e-2) for m in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for model, optimizer, scaled in zip(models, optimizers, (True, False), strict=True):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(x).float().square().mean()
        if scaled:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
    for (name, p), q in zip(trained(models[0]).items(), trained(models[1]).values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)
    before = copy.deepcopy(trained(models[0]))
    optimizers[0].zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = models[0](x).float().square().mean() * float("inf")
    scaler.scale(loss).backward()
    scaler.step(optimizers[0])
    scaler.update()
    assert scaler.get_scale() == 64.0
    assert all(torch.equal(p, before[n]) for n, p in trained(models[0]).items())


@every_case
def test_gradient_accumulation(case):
    """The gradients of four quarters of a batch add up to the batch's."""
    model, x = net(case, torch.float64), torch.randn(16, 8, dtype=torch.float64)
    model(x).square().sum().backward()
    want = {n: p.grad for n, p in trained(model).items()}
    model.zero_grad()
    for part in x.chunk(4):
        model(part).square().sum().backward()
    for name, p in trained(model).items():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-12, atol=1e-12, msg=name)

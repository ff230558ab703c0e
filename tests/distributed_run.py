"""What test_distributed.py runs in several processes: `python distributed_run.py OUT RANK WORLD PORT CHECK...`

Each check trains every method in fp64 under one of PyTorch's distributed engines, and compares outputs, gradients, the
trained values and the checkpoint with a single process on the whole batch. The first process writes {check: {case:
problem}} to OUT/<world>.json.
"""

from __future__ import annotations

import copy
import faulthandler
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

import peft
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import CASES, Case
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import state_dict as sd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import fused_peft as fp
from fused_peft.core import ops
from fused_peft.core.sharded import whole
from fused_peft.distributed.parallel import ColwiseParallel, RowwiseParallel, shard
from fused_peft.model import convert

K, H, N, ROWS, STEPS = 8, 12, 4, 8, 4
PLAIN = [c for c in CASES if "dropout" not in c.name and c.name != "parallel_adapter+all"]
PLAIN.append(Case("lora+trained_biases", "lora", lambda r: fp.LoraConfig(r=r, bias="all")))
OUT, RANK, WORLD = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
CHECKS: dict[str, Callable] = {}
PLAN = {"0": ColwiseParallel(), "2": RowwiseParallel()}


def check(of):
    CHECKS[of.__name__] = of
    return of


def in_fp64(K: int, N: int) -> nn.Linear:
    return nn.Linear(K, N).double()


def net(case: Case, linear: Callable = in_fp64) -> nn.Module:
    """Two adapted layers, the same in every process."""
    torch.manual_seed(0)
    model = nn.Sequential(linear(K, H), nn.Tanh(), linear(H, N))
    config = case.make(3)
    config.target_modules = ["0", "2"]
    model = fp.get_peft_model(model, config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(ROWS, K, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def share(x: torch.Tensor, split: int = 1, index: int = 0) -> torch.Tensor:
    return x.chunk(split)[index].clone().requires_grad_()


def step(model, optimizer, x, number: int, scale: float = 1.0, penalty: bool = False) -> dict[str, torch.Tensor]:
    """One training step; y, dx and the whole gradients before it."""
    y = model(x)
    loss = scale * y.square().sum()
    if penalty:
        loss = loss + fp.mpc_penalty(model, "o")
    loss.backward()
    found = {"y": y.detach(), "x": x.grad}
    found |= {n: whole(p.grad) for n, p in convert.unwrap(model).named_parameters() if p.grad is not None}
    optimizer.step()
    fp.on_step(model, number)
    optimizer.zero_grad()
    return found


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers; what a quantiser adds to a state_dict it leaves out of a sharded one's."""
    return {n: whole(t.detach()) for n, t in convert.unwrap(model).state_dict().items() if ".weight." not in n}


def differing(got: dict, want: dict, rtol: float = 1e-9) -> list[str]:
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    return [n for n in want if not torch.allclose(got[n], want[n], rtol=rtol, atol=rtol)]


def compare(
    case: Case, spread: Callable, split: int = 1, index: int = 0, scale: float = 1.0, linear: Callable = in_fp64
) -> list[str]:
    """What differs between a spread model and one process: each step's results, the trained values, the checkpoint,
    the merged and the disabled model."""
    alone, together = net(case, linear), net(case, linear)
    together = spread(together)
    optimizers = adamw(alone), adamw(together)
    wrong = []
    for i, batch in enumerate(batches()):
        want = step(alone, optimizers[0], share(batch), i)
        got = step(together, optimizers[1], share(batch, split, index), i, scale)
        rows = {n: want[n].chunk(split)[index] for n in ("y", "x")}
        wrong += [f"step {i}: {n}" for n in differing(got | {"x": got["x"] / scale}, want | rows)]
    wrong += [f"trained {n}" for n in differing(values(together), values(alone))]
    x = batches()[0]
    for model, folder in ((alone, f"alone{RANK}"), (together, "together")):
        fp.save_pretrained(model, OUT / f"{WORLD}" / case.name / folder)
    files = [OUT / f"{WORLD}" / case.name / f / "adapter_model.safetensors" for f in ("together", f"alone{RANK}")]
    dist.barrier()
    wrong += [f"stored {n}" for n in differing(*map(load_file, files))]
    first = alone[0]
    mergeable = first.method.weight or (first.method.factors and first.factors().mergeable)
    if first.kind.packed:
        wrong += [] if refused(lambda: fp.merge(together), "quantising a merged one anew") else ["merge"]
        mergeable = False
    with torch.no_grad():  # after which FSDP2 leaves the outermost group gathered; what nobody reads is not waited for
        together(x).sum()
    for act in (fp.merge, fp.unmerge) if mergeable else ():
        act(alone), act(together)
        wrong += [act.__name__] * (not torch.allclose(together(x), alone(x), rtol=1e-9, atol=1e-9))
    first = convert.unwrap(together)[0]
    if RANK == 0 and isinstance(first.weight, DTensor) and not first.forms_weight(2048):
        shown = [e.why for e in fp.explain(together)]  # by one process: it must not communicate
        wrong += ["explained"] * (not all("sharded over" in why for why in shown))
    with fp.disable_adapter(alone), fp.disable_adapter(together):
        wrong += ["disabled"] * (not torch.allclose(together(x), alone(x), rtol=1e-9, atol=1e-9))
    with torch.no_grad():
        before = together(x)
        for p in together.parameters():
            if p.requires_grad:
                p.zero_()
        fp.load_adapter(together, files[0].parent)
        wrong += ["reloaded"] * (not torch.allclose(together(x), before, rtol=1e-9, atol=1e-9))
    return wrong


def refused(act: Callable, text: str) -> bool:
    try:
        act()
    except (ValueError, TypeError, RuntimeError) as e:
        return text in str(e)
    return False


def every_case(spread: Callable, cases=PLAIN, **where) -> dict[str, str]:
    problems = {}
    for case in cases:
        try:
            wrong = compare(case, spread, **where)
        except Exception:  # the other processes fail alike; the report is the test's message
            wrong = [traceback.format_exc()]
        if wrong:
            problems[case.name] = "; ".join(wrong)
    return problems


def sharded(model: nn.Module, mesh=None, **policy) -> nn.Module:
    for i in (0, 2):
        fully_shard(model[i], mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


@check
def ddp():
    return every_case(DistributedDataParallel, split=WORLD, index=RANK, scale=WORLD)


@check
def fsdp():
    return every_case(sharded, split=WORLD, index=RANK, scale=WORLD)


def in_4_bits(storage: torch.dtype, nested: bool) -> Callable:
    import bitsandbytes as bnb

    def linear(K: int, N: int) -> nn.Module:
        how = {"quant_type": "nf4", "compress_statistics": nested, "quant_storage": storage}
        layer = bnb.nn.Linear4bit(K, N, compute_dtype=torch.float64, **how)
        layer.weight = bnb.nn.Params4bit(torch.randn(N, K) / K**0.5, blocksize=32, module=layer, **how)
        layer = layer.to("cpu")
        layer.bias.data = layer.bias.data.double()
        return layer

    return linear


@check
def fsdp_in_4_bits():
    """The codes sharded, whatever dtype they are stored in; the scales are whole in every process."""
    problems = {}
    if importlib.util.find_spec("bitsandbytes") is None:
        return problems
    for storage, nested, names in (
        (torch.bfloat16, True, ("dora", "pissa", "svdiff", "lora_dash", "lora+trained_biases")),
        (torch.float32, False, ("lora",)),
        (torch.uint8, True, ("lora",)),
    ):
        cases = [c for c in PLAIN if c.name in names]
        where = {"split": WORLD, "index": RANK, "scale": WORLD, "linear": in_4_bits(storage, nested)}
        problems |= {f"{n} {storage}": p for n, p in every_case(sharded, cases, **where).items()}
    lora, x = FACTORED[0], share(batches()[0].float(), WORLD, RANK)
    for storage in (torch.bfloat16, torch.float32):
        model = net(lora, in_4_bits(storage, True))
        model = sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        if storage == torch.bfloat16:
            model(x).sum().backward()
        elif not refused(lambda model=model: model(x), "its codes were cast to torch.bfloat16"):
            problems["codes cast"] = "not refused"
    return problems


class Routed(nn.Module):
    """Experts by Transformers' contract behind a fixed choice of two."""

    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": K, "moe_intermediate_size": H, "num_experts": 4, "num_experts_per_tok": 2}
        self.experts = Qwen3MoeExperts(Qwen3MoeConfig(**sizes, experts_implementation="eager"))
        for p in self.experts.parameters():
            nn.init.normal_(p, std=0.5)

    def forward(self, x):
        index = torch.stack([x[:, :2].sum(1) > 0, x[:, 2:].sum(1) > 0], 1).long() + torch.tensor([0, 2])
        return self.experts(x, index, x[:, :2].detach().sigmoid())


@check
def experts():
    """Stacks of experts under FSDP2: each step, the trained values, and the checkpoint."""
    problems, configs = {}, (fp.LoraConfig(r=3), fp.DoraConfig(r=3), fp.SSBConfig(), fp.VeraConfig(r=3))
    for config in configs:
        config.target_modules, config.target_parameters = [], ["gate_up_proj", "down_proj"]
        torch.manual_seed(0)
        alone = fp.get_peft_model(Routed().double(), config)
        with torch.no_grad():
            for p in alone.parameters():
                if p.requires_grad:
                    p.add_(0.3 * torch.randn_like(p))
        together = fully_shard(copy.deepcopy(alone))
        optimizers, wrong = (adamw(alone), adamw(together)), []
        for i, batch in enumerate(batches()):
            want = step(alone, optimizers[0], share(batch), i)
            got = step(together, optimizers[1], share(batch, WORLD, RANK), i, WORLD)
            rows = {n: want[n].chunk(WORLD)[RANK] for n in ("y", "x")}
            wrong += [f"step {i}: {n}" for n in differing(got | {"x": got["x"] / WORLD}, want | rows)]
        wrong += [f"trained {n}" for n in differing(values(together), values(alone))]
        folders = [OUT / "experts" / config.method_name / name for name in ("together", f"alone{RANK}")]
        for model, folder in ((together, folders[0]), (alone, folders[1])):
            fp.save_pretrained(model, folder)
        dist.barrier()
        wrong += [f"stored {n}" for n in differing(*(load_file(f / "adapter_model.safetensors") for f in folders))]
        if wrong:
            problems[config.method_name] = "; ".join(wrong)
    return problems


@check
def tensor_parallel():
    mesh = init_device_mesh("cpu", (WORLD,))
    return every_case(lambda m: parallelize_module(m, mesh, PLAN))


@check
def tensor_parallel_and_fsdp():
    mesh = plane()
    where = {"split": WORLD // 2, "index": mesh["dp"].get_local_rank(), "scale": WORLD // 2}
    return every_case(lambda m: sharded(parallelize_module(m, mesh["tp"], PLAN), mesh["dp"]), **where)


def halfway(spread: Callable, folder: str) -> dict[str, str]:
    """Every case trained for half the steps and saved through torch.distributed.checkpoint."""
    for case in PLAIN:
        model = spread(net(case))
        optimizer = adamw(model)
        for i, batch in enumerate(batches()[: STEPS // 2]):
            step(model, optimizer, share(batch), i)
        states = dict(zip(("model", "optimizer"), sd.get_state_dict(model, optimizer), strict=True))
        dcp.save(states, checkpoint_id=OUT / folder / case.name)
    return {}


def resumed(spread: Callable, folder: str) -> dict[str, str]:
    """The other half by another number of processes, from what was saved: a run by one process that never stopped."""
    problems = {}
    for case in PLAIN:
        alone, model = net(case), spread(net(case))
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()  # everything comes from the checkpoint
        optimizers = adamw(alone), adamw(model)
        states = dict(zip(("model", "optimizer"), sd.get_state_dict(model, optimizers[1]), strict=True))
        dcp.load(states, checkpoint_id=OUT / folder / case.name)
        sd.set_state_dict(model, optimizers[1], model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        for i, batch in enumerate(batches()):
            want = step(alone, optimizers[0], share(batch), i)
            if i >= STEPS // 2:
                wrong = differing(step(model, optimizers[1], share(batch), i), want)
                problems |= {case.name: f"step {i}: {wrong}"} if wrong else {}
        if wrong := differing(values(model), values(alone)):
            problems[case.name] = f"trained {wrong}"
    return problems


def plane():
    return init_device_mesh("cpu", (WORLD // 2, 2), mesh_dim_names=("dp", "tp"))


@check
def fsdp_halfway():
    return halfway(sharded, "fsdp")


@check
def fsdp_resumed():
    return resumed(sharded, "fsdp")


@check
def parallel_halfway():
    mesh = plane()
    return halfway(lambda m: sharded(parallelize_module(m, mesh["tp"], PLAN), mesh["dp"]), "parallel")


@check
def parallel_resumed():
    mesh = init_device_mesh("cpu", (WORLD,))
    return resumed(lambda m: parallelize_module(m, mesh, PLAN), "parallel")


FACTORED = [c for c in PLAIN if c.name in ("lora", "trilora", "adalora")]


def penalised(spread: Callable) -> dict[str, str]:
    """Training with an orthogonality penalty, whose gradient does not come through the layers' forward."""
    problems = {}
    for case in FACTORED:
        models = net(case), spread(net(case))
        optimizers = [adamw(m) for m in models]
        for i, batch in enumerate(batches()):
            want, got = (step(m, o, share(batch), i, penalty=True) for m, o in zip(models, optimizers, strict=True))
            if wrong := differing(got, want):
                problems[case.name] = f"step {i}: {wrong}"
    return problems


@check
def penalty():
    mesh = init_device_mesh("cpu", (WORLD,))
    return penalised(lambda m: parallelize_module(m, mesh, PLAN)) | penalised(sharded)


@check
def mixed_precision_and_offload():
    """FSDP2 computing in bf16 from fp32 shards: what a bf16 model gives. Parameters kept on the CPU: no difference."""
    problems = {}
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    for case in PLAIN:
        got = []
        for policy in (None, {"mp_policy": mixed}, {}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}):
            model, x = net(case).float(), share(batches()[0].float(), WORLD, RANK)
            if policy is None:  # each process on its own, in bf16
                model, x = model.bfloat16(), x.detach().bfloat16().requires_grad_()
            else:
                model = sharded(model, **policy)
            got.append(step(model, adamw(model), x, 0))
        for n, alone in got[0].items():
            want = alone.float()
            if n not in ("x", "y"):
                dist.all_reduce(want)
                want /= WORLD
            error = (got[1][n] - want).norm() / want.norm().clamp_min(0.05)
            if got[1][n].dtype != torch.float32 or not error < 0.03:
                problems[case.name] = f"mixed precision: {n} {got[1][n].dtype} {error}"
            if not torch.equal(got[3][n], got[2][n]):
                problems[case.name] = f"offload: {n}"
    return problems


@check
def dropout():
    """Column-wise every process draws one mask, that of a single process; row-wise each its own."""
    mesh = init_device_mesh("cpu", (WORLD,))
    problems = {}
    for case in (c for c in CASES if "dropout" in c.name):
        x, want, got = batches()[0], net(case), net(case)
        parallelize_module(got, mesh, {"0": ColwiseParallel(output_layouts=Replicate())})
        ys = []
        for model in (want, got):
            torch.manual_seed(5 + (RANK if model is got else 0))  # the first process's generator decides
            ys.append(model[0](x))
        if not torch.allclose(*ys, rtol=1e-9, atol=1e-9):
            problems[case.name] = "column-wise"
    lora = next(c for c in CASES if c.name == "lora+dropout")
    layer = net(lora)[2]
    with torch.no_grad():
        base = nn.functional.linear(torch.ones(400, H).double(), layer.weight, layer.bias)
        layer.lora_A.fill_(1), layer.lora_B.fill_(1)
        parallelize_module(layer, mesh, RowwiseParallel(input_layouts=Replicate()))
        kept = (layer(torch.ones(400, H).double()) - base)[:, 0] * 0.6 / 3 / layer.config.scaling  # of H, each row
    if not torch.allclose(kept, kept.round(), atol=1e-9) or abs(kept.mean() / H - 0.6) > 0.03:
        problems["row-wise mean"] = f"keeps {kept.mean() / H}"
    if abs(kept.var() - 0.24 * H) > 0.24 * H * 0.3:  # twice that if the processes shared their mask
        problems["row-wise"] = f"variance {kept.var()} for {0.24 * H}"
    return problems


@check
def accelerated_peft():
    """PEFT's own layers on the fused call, and methods registered with PEFT, against PEFT in one process."""
    names = {"target_modules": ["0", "2"]}
    configs = {
        "lora": lambda: peft.LoraConfig(r=3, init_lora_weights=False, **names),
        "dora": lambda: peft.LoraConfig(r=3, use_dora=True, init_lora_weights=False, **names),
        "adalora": lambda: peft.AdaLoraConfig(
            init_r=3, target_r=2, tinit=5, total_step=9, init_lora_weights=False, **names
        ),
        "ia3": lambda: peft.IA3Config(feedforward_modules=["2"], init_ia3_weights=False, **names),
        "ssb": lambda: fp.SSBConfig(**names),
        "flora": lambda: fp.FloraConfig(r=3, **names),
        "svdiff": lambda: fp.SVDiffConfig(**names),
    }
    problems = {}
    for name, config in configs.items():
        for spread in (DistributedDataParallel, lambda m: sharded(m.base_model.model) and fully_shard(m)):
            models = []
            for _ in range(2):
                torch.manual_seed(0)
                model = nn.Sequential(nn.Linear(K, H), nn.Tanh(), nn.Linear(H, N)).double()
                models.append(peft.get_peft_model(model, config()))
            spread_out = spread(fp.accelerate(models[1]))
            optimizers = adamw(models[0]), adamw(spread_out)
            for i, batch in enumerate(batches()[:2]):
                want = step(models[0], optimizers[0], share(batch), i)
                got = step(spread_out, optimizers[1], share(batch, WORLD, RANK), i, scale=WORLD)
                want |= {n: want[n].chunk(WORLD)[RANK] for n in ("y", "x")}
                if wrong := differing(got | {"x": got["x"] / WORLD}, want):
                    problems[name] = f"step {i}: {wrong}"
    return problems


@check
def refusals():
    line = init_device_mesh("cpu", (WORLD,))
    layer = lambda K, N: fp.PeftLinear(K, N, config=fp.DoraConfig(r=2))  # noqa: E731
    done = parallelize_module(layer(8, 4), line, ColwiseParallel())
    odd, other = layer(7, 9), init_device_mesh("cpu", (WORLD,), mesh_dim_names=("other",))
    before = {n: t.clone() for n, t in odd.state_dict().items()}
    merged = layer(8, 4)
    merged.merge()
    cases = {
        "uneven out": (lambda: parallelize_module(odd, line, ColwiseParallel()), "out_features=9 cannot be split"),
        "uneven in": (lambda: parallelize_module(odd, line, RowwiseParallel()), "in_features=7 cannot be split"),
        "plane": (lambda: shard(layer(8, 4), plane(), "out"), "has 2 dimensions"),
        "twice": (lambda: shard(done, line, "in"), "the layer is sharded already"),
        "merged": (lambda: shard(merged, line, "in"), "the layer is merged"),
        "plain x": (lambda: ops.linear(DTensor.from_local(torch.ones(3, 8), line), layer(8, 4).weight, fp.Factors()),
                    "x is a DTensor but w is a plain tensor"),
        "mesh": (lambda: done.forward(DTensor.from_local(torch.ones(3, 8), other)), "give both the same device mesh"),
        "adapt": (lambda: fp.PeftLinear.from_linear(parallelize_module(nn.Linear(8, 4), line, ColwiseParallel()),
                  fp.SSBConfig()), "adapt the model before"),
        "unload": (lambda: fp.merge_and_unload(sharded(net(FACTORED[0]))), "fully_shard manages"),
    }  # fmt: skip
    problems = {}
    for name, (act, text) in cases.items():
        try:
            act()
            problems[name] = "not refused"
        except (ValueError, TypeError, RuntimeError) as e:
            if text not in str(e):
                problems[name] = str(e)
    if any(not torch.equal(t, before[n]) for n, t in odd.state_dict().items()):
        problems["uneven"] = "the layer was changed"
    return problems


if __name__ == "__main__":
    faulthandler.enable()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[4]}", rank=RANK, world_size=WORLD)
    found = {}
    for name in sys.argv[5:] or CHECKS:
        try:
            found[name] = CHECKS[name]()
        except Exception:
            found[name] = {"": traceback.format_exc()}
    if RANK == 0:
        (OUT / f"{WORLD}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # without the interpreter's end, at which a process has been seen to abort

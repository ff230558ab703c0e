"""DeepSpeed ZeRO-2 and 3 on the CPU, in one process or several, run by test_zero3: the first prints, as JSON, what it
found by method. Arguments: folder, port, rank, processes, methods."""

import contextlib
import json
import os
import sys
import warnings

FOLDER, PORT, RANK, WORLD, *NAMES = sys.argv[1:]
os.environ |= {"RANK": RANK, "WORLD_SIZE": WORLD, "LOCAL_RANK": RANK, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}
os.environ["DS_ACCELERATOR"] = "cpu"
out, sys.stdout = sys.stdout, sys.stderr  # DeepSpeed talks
import deepspeed  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402

import fused_peft as fp  # noqa: E402
from fused_peft.methods import METHODS  # noqa: E402

PARTITION = {
    "train_batch_size": 4,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
}


SHARE = {**PARTITION, "zero_optimization": {"stage": 2}}  # optimizer states and gradients


def config_of(name):
    config = METHODS[name].example(4)
    config.target_modules = ["a", "b"]
    if name == "lora":
        config.bias, config.modules_to_save = "lora_only", ["head"]
    return config


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(32, 48), nn.Linear(48, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


def net():
    torch.manual_seed(0)
    return Net()


def adapted(model, config):
    torch.manual_seed(1)
    return fp.get_peft_model(model, config)


def trained(model, x, engine=None):
    losses = []
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = None if engine else torch.optim.SGD(trainable, 0.05)
    mine = x.chunk(int(WORLD))[int(RANK)] if engine else x
    for _ in range(3):
        loss = (engine or model)(mine).square().mean()
        engine.backward(loss) if engine else loss.backward()
        (engine or optimizer).step()
        if optimizer:
            optimizer.zero_grad()
        if engine:  # of every process's share of the batch, as long each
            torch.distributed.all_reduce(loss := loss.detach() / int(WORLD))
        losses.append(loss.item())
    return losses


def far(a, b):
    return (a - b).abs().max().item()


def run(name, folder):
    config = config_of(name)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    plain = adapted(net(), config)
    want = trained(plain, x)
    base = net().state_dict()

    with deepspeed.zero.Init(config_dict_or_path=PARTITION):
        model = Net()
    with deepspeed.zero.GatheredParameters([*model.parameters()], modifier_rank=0):
        model.load_state_dict(base)
    adapted(model, config)
    counts = fp.print_trainable_parameters(model), fp.print_trainable_parameters(plain)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=[p for p in model.parameters() if p.requires_grad], config=PARTITION
    )
    found = {"losses": trained(model, x, engine), "want": want, "counts": counts}
    model.eval(), plain.eval()
    y = model(x).detach()
    found["trained"] = far(y, plain(x))
    fp.save_pretrained(model, folder)
    if RANK == "0":
        fp.save_pretrained(plain, f"{folder}/plain")
    torch.distributed.barrier()
    stored, theirs = (load_file(f"{f}/adapter_model.safetensors") for f in (folder, f"{folder}/plain"))
    found["shapes"] = {k: list(v.shape) for k, v in stored.items()} == {k: list(v.shape) for k, v in theirs.items()}
    found["reloaded"] = far(fp.load_adapter(net().eval(), folder)(x), y)
    with contextlib.suppress(fp.NotMergeableError):
        fp.merge(model)
        found["merged"] = far(model(x).detach(), y)
        fp.unmerge(model)
    found["unmerged"] = far(model(x).detach(), y)
    with fp.disable_adapter(model):
        found["disabled"] = far(model(x).detach(), net()(x))
    trainable = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad(), deepspeed.zero.GatheredParameters(trainable, modifier_rank=0):
        for p in trainable:
            p.fill_(0.5)
    found["overwritten"] = far(model(x).detach(), y)
    fp.load_adapter(model, folder)
    found["loaded back"] = far(model(x).detach(), y)
    for call in (fp.mpc_penalty, fp.merge_and_unload):
        try:
            call(model)
        except (RuntimeError, ValueError) as e:
            found[call.__name__] = str(e)
    return found


def run_stage_two(name, folder):
    config, x = config_of(name), torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    want = trained(adapted(net(), config), x)
    model = adapted(net(), config)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=[p for p in model.parameters() if p.requires_grad], config=SHARE
    )
    losses = trained(model, x, engine)
    if RANK == "0":
        fp.save_pretrained(model, folder)
    torch.distributed.barrier()
    y = model.eval()(x).detach()
    return {"losses": losses, "want": want, "reloaded": far(fp.load_adapter(net().eval(), folder)(x), y)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        deepspeed.ops.__compatible_ops__.clear()  # a C++ extension for messages within a machine: minutes to compile
        deepspeed.init_distributed("gloo")
        found = {name: run(name, f"{FOLDER}/{name}") for name in NAMES}
        for name in NAMES:
            found[name]["stage two"] = run_stage_two(name, f"{FOLDER}/{name}-2")
    if RANK == "0":
        print(json.dumps(found), file=out, flush=True)
    torch.distributed.barrier()
    os._exit(0)

"""LoRA on a small Llama over several processes, with PyTorch's own engines.

    torchrun --nproc-per-node 2 bench/examples/distributed.py --parallel fsdp        # or ddp, tp
    torchrun --nproc-per-node 4 bench/examples/distributed.py --parallel tp+fsdp
    torchrun --nproc-per-node 2 bench/examples/distributed.py --stop-after 10        # an interrupted run ...
    torchrun --nproc-per-node 4 bench/examples/distributed.py --resume               # ... goes on with other processes

nccl where every process has a GPU, else gloo. A step sees the same batch however many processes share it, so the losses
agree to rounding (with dropout each process draws masks of its own).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from causal_lm import CONFIG, TARGETS, blocks
from torch.distributed.checkpoint import state_dict as sd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM, set_seed

import fused_peft as fp
from fused_peft.distributed.parallel import ColwiseParallel, RowwiseParallel

BATCH = 8  # of all processes together
PLAN = {f"model.layers.*.self_attn.{n}_proj": ColwiseParallel() for n in "qkv"} | {
    "model.layers.*.self_attn.o_proj": RowwiseParallel(),
    "model.layers.*.mlp.gate_proj": ColwiseParallel(),
    "model.layers.*.mlp.up_proj": ColwiseParallel(),
    "model.layers.*.mlp.down_proj": RowwiseParallel(),
}
TRAINED = sd.StateDictOptions(ignore_frozen_params=True, strict=False)


def training_state(model, optimizer, step: int) -> dict:
    """What a checkpoint holds: the adapter's and the optimizer's tensors, as this process has them, and the step."""
    own, moments = sd.get_state_dict(model, optimizer, options=TRAINED)
    return {"model": own, "optimizer": moments, "step": step}


def spread(model, parallel: str, device: str):
    """The model over all processes; how many share a batch, and this one's place among them."""
    world = dist.get_world_size()
    if parallel == "ddp":
        return DistributedDataParallel(model), world, dist.get_rank()
    if "tp" in parallel:
        if world % 2:
            raise SystemExit(f"--parallel {parallel} needs an even number of processes, not {world}")
        mesh = init_device_mesh(device, (world // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], PLAN)
        if parallel == "tp":
            return model, 1, 0
        dp = mesh["dp"]
    else:
        dp = init_device_mesh(device, (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=dp)
    return fully_shard(model, mesh=dp), dp.size(), dp.get_local_rank()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", choices=("ddp", "fsdp", "tp", "tp+fsdp"), default="fsdp")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stop-after", type=int, help="end after this many steps, as an interrupted run would")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--output-dir", type=Path, default=Path("out/distributed"))
    args = parser.parse_args()
    gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = "cuda" if gpus else "cpu"
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpus else "gloo")

    set_seed(0)  # the same start in every process
    model = LlamaForCausalLM(CONFIG).to(device)
    model = fp.get_peft_model(model, fp.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    model, parts, part = spread(model, args.parallel, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    data = blocks("\n".join(topics.values()).encode())
    start, checkpoint = 0, args.output_dir / "checkpoint"
    if args.resume:
        state = training_state(model, optimizer, 0)
        dcp.load(state, checkpoint_id=checkpoint)
        sd.set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=TRAINED
        )
        start = state["step"]
    end = args.stop_after or args.steps
    for step in range(start, end):
        rows = [data[(step * BATCH + i) % len(data)]["input_ids"] for i in range(BATCH)][part::parts]
        ids = torch.stack(rows).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step:3d}  loss {mean.item() / dist.get_world_size():.6f}", flush=True)
    dcp.save(training_state(model, optimizer, end), checkpoint_id=checkpoint)
    fp.save_pretrained(model, args.output_dir / "adapter")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

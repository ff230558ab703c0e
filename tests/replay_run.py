"""A process of its own, on a stand-in for the CUDA driver: each call is launched by Triton and by csrc/replay.cpp, and
what the driver gets is compared byte for byte. Arguments: cases, or CASE@BACKEND. Prints one JSON line a case."""

import json
import sys

import standin
import torch
from cases import CASES, Shape
from oracle import build

import fused_peft as fp
from fused_peft.backends import extension, replay
from fused_peft.backends.triton import kernels
from fused_peft.core import ops

SHAPES = Shape((3, 64), 256, 320, 16), Shape((24,), 200, 136, 8)  # through TMA, and not
driver = standin.install()
standin.take_csrc(driver)
launch, from_python = kernels().launch, []
start = launch.start


def watched(*args):
    compiled = start(*args)
    if isinstance(compiled, extension.Started):
        from_python.append(compiled.name)
        return compiled
    driver.layout(compiled.function, replay.parameter_sizes(compiled.asm["ptx"]))
    from_python.append(args[0].__name__)
    return compiled


def told(launches, tensors):
    """Launches with each pointer as the tensor that it points into, since what is made on the way lies elsewhere."""

    def place(data: bytes):
        at = int.from_bytes(data[:8], "little")
        for i, t in enumerate(tensors):
            if t.data_ptr() <= at < t.data_ptr() + t.nbytes:
                return i, at - t.data_ptr(), data[8:].hex()
        return "made" if at > 1 << 45 else at, data[8:].hex()

    def split(p: bytes):
        """csrc/'s kernels take one struct, of tensor maps, pointers and numbers."""
        return [p[i : i + 8] for i in range(0, len(p), 8)] if len(p) > 8 and len(p) != 128 else [p]

    return [
        (
            function,
            shape,
            shared,
            [place(p) if len(p) in (8, 128) else p.hex() for whole in parameters for p in split(whole)],
        )
        for function, shape, shared, parameters in launches
    ]


def compared(case, shape, backend):
    fp.set_backend(None)
    layer = build(case, shape, dtype=torch.bfloat16)
    fp.set_backend(backend)
    x = torch.randn(*shape.lead, shape.K, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(*shape.lead, shape.N, dtype=torch.bfloat16)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def step(host):
        ops.host = host
        from_python.clear()
        torch.manual_seed(0)
        with driver.launches() as found:
            torch.autograd.grad(layer(x), wanted, dy, allow_unused=True)
        return told(found, [x, dy, *layer.parameters(), *layer.buffers()])

    module, _ = ops.host, step(None)
    triton = step(None)
    step(module), step(module)
    ours = step(module)
    return {"launches": len(ours), "equal": triton == ours, "from Python": len(from_python)}


replay.load(standin.NAME)
launch.start = watched
known = {case.name: case for case in CASES}
for asked in sys.argv[1:]:
    name, _, backend = asked.partition("@")
    for shape in SHAPES:
        found = compared(known[name], shape, backend or "triton")
        print(json.dumps({"case": f"{asked} {shape}", **found}), flush=True)
print(json.dumps({"without plan": dict(replay.without_plan)}))

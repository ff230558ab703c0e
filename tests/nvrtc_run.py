"""A process of its own, on a stand-in for the CUDA driver: kernels of csrc/ compiled by NVRTC and called. Argument: the
folder of NVRTC's package. Prints one JSON object: what the driver got, and the host's time."""

import ctypes
import json
import sys
import tempfile
import time
from pathlib import Path
from struct import unpack_from

import standin
import torch

sys.path.append(sys.argv[1])
driver = standin.StandIn(Path(tempfile.mkdtemp(prefix="standin-")))

from plans import Gemm  # noqa: E402

from fused_peft.backends import extension  # noqa: E402
from fused_peft.backends.plans import CAST, PLANS, Call, Cast, Factor  # noqa: E402

NAMES = ("x", "w", "s", "b", "y", "z", "a", "d_in")  # the order of gemm.cuh's tensor maps
called = []


def remember(plan, call):
    called.append(call)


def calls(plan, M, N, K, R, **options) -> tuple[Gemm, Call]:
    gemm = Gemm(plan, M, N, K, R)
    gemm.run(start=remember, processors=132, **options)
    return gemm, called[-1]


def told(name: str, call, size: int) -> dict:
    """What the driver is given for a call."""
    before = ctypes.c_int.in_dll(driver.library, "standin_kernels").value
    extension.function(name, False)
    kernel = ctypes.c_int.in_dll(driver.library, "standin_kernels").value
    driver.layout(kernel, [size])
    with driver.launches() as found:
        extension.call(name, call, False)
    ((function, shape, shared, (data,)),) = found
    allowed = [ctypes.c_int.in_dll(driver.library, n).value for n in ("standin_shared", "standin_shared_on")]
    attributes = (ctypes.c_int * 25).in_dll(driver.library, "standin_attributes")
    return {
        "new": kernel - before, "own": function == kernel, "shape": shape, "shared": shared, "allowed": allowed,
        "attributes": {attributes[1 + 3 * i]: attributes[2 + 3 * i] for i in range(attributes[0])},
        "maps": {name: tensor_map(data[128 * i : 128 * i + 128]) for i, name in enumerate(NAMES) if size > 1024},
    }  # fmt: skip


def tensor_map(data: bytes) -> dict:
    """As the stand-in writes it down."""
    address, kind, rank, _, swizzle, l2, _ = unpack_from("<Q6i", data)
    columns, rows = unpack_from("<2Q", data, 32)
    (row_bytes,), box = unpack_from("<Q", data, 72), unpack_from("<2I", data, 104)
    return {"address": address, "kind": kind, "swizzle": swizzle, "l2": l2, "rank": rank, "shape": [rows, columns],
            "row_bytes": row_bytes, "box": [box[1], box[0]]}  # fmt: skip


def microseconds(run, calls: int = 500, rounds: int = 9) -> float:
    """Of this thread's own time, the least of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(calls):
            run()
        best = min(best, 1e6 * (time.thread_time() - start) / calls)
    return best


def plan_of(form: str, across: bool = False):
    return next(p for p in PLANS if (p.dtype, p.BM, p.BN, p.form, p.across) == ("bf16", 128, 256, form, across))


found = {"failure": extension.failure()}
library = extension.library()
sizes = [library.fused_peft_sizes(which) for which in range(3)]
found["parameters"] = sizes[2]

late = plan_of("LATE")
gemm, call = calls(late, 300, 512, 136, 24, cluster=(2, 1))
call.overlap = 1
found["LATE"] = told(late.name, call, sizes[2])
found["addresses"] = {name: getattr(gemm, name).data_ptr() for name in ("x", "w", "s", "b")}
found["row_bytes"] = {name: 2 * getattr(gemm, name).stride(0) for name in ("x", "w", "s", "b")}

inline = plan_of("INLINE")
gemm, call_inline = calls(inline, 300, 512, 136, 16)
found["INLINE"] = told(inline.name, call_inline, sizes[2])
found["t"] = call_inline.t

x = torch.zeros(3, 5)
out = torch.empty(3, 5, dtype=torch.bfloat16)
factor = Factor(source=x, to=out, row_stride=5, column_stride=1, rows=3, columns=5, kind=1, scale=2.0)
cast = Cast(factors=(Factor * 2)(factor), dtype=2)
found["cast"] = told(CAST, cast, ctypes.sizeof(Cast))["shape"]

driver.library.standin_get_context.restype = ctypes.c_void_p
for name, struct in ((late.name, call), (CAST, cast)):
    driver.library.standin_set_context(None)  # as on a thread of autograd's
    struct.device = 3
    extension.call(name, struct, False)
    found["allowed on"] = ctypes.c_int.in_dll(driver.library, "standin_shared_on").value
    found[f"context of {'cast' if name == CAST else 'plan'}"] = driver.library.standin_get_context()

fields = {name: getattr(call, name) for name, _ in Call._fields_}
found["us_call"] = microseconds(lambda: extension.call(late.name, call, False))
found["us_struct_and_call"] = microseconds(lambda: extension.call(late.name, Call(**fields), False))

version = ctypes.c_int.in_dll(driver.library, "standin_version")
for number in (11080, 12040):
    version.value = number
    extension.driver_version.cache_clear()
    found[f"failure {number}"] = extension.failure()
print(json.dumps(found))

"""What works where torch and this library alone are installed: commands, checkpoints, kernels, the pages' core.

`make bare` runs it in such an environment, which has no test runner. Exit status 1 when a check fails.
"""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRA = ("peft", "transformers")  # what ".[peft]" installs; a snippet that imports one needs it
SMALL = "from pathlib import Path; import torch, fused_peft as fp\n"

CHECKPOINT = """
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
config = fp.LoraConfig(r=2, target_modules="all-linear")
trained, x = fp.get_peft_model(model(), config), torch.randn(3, 8)
with torch.no_grad():
    for p in trained.parameters():
        if p.requires_grad:
            p.add_(0.1)
fp.save_pretrained(trained, "adapter")
loaded = model()
fp.load_adapter(loaded, "adapter")
assert not torch.equal(trained(x), model()(x)) and torch.equal(loaded(x), trained(x))
"""

TRITON = """
layer = fp.PeftLinear.from_linear(torch.nn.Linear(32, 32), fp.LoraConfig(r=4, lora_dropout=0.5, target_modules=["0"]))
x = torch.randn(16, 32)
def run(backend):
    fp.set_backend(backend)
    torch.manual_seed(0)
    layer.zero_grad()
    y = layer(x)
    y.square().sum().backward()
    return [y, *(p.grad for p in layer.parameters() if p.requires_grad)]
fp.set_strict(True)
with torch.no_grad():
    layer.lora_B.add_(0.1)
for ours, plain in zip(run("triton"), run("eager"), strict=True):
    torch.testing.assert_close(ours, plain)
"""


def snippets(text: str) -> tuple[list[str], list[str]]:
    """The Python blocks of a Markdown text: those that need torch and this library alone, and those that need EXTRA."""
    core, extra = [], []
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        nodes = list(ast.walk(ast.parse(block)))
        names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        (extra if {name.partition(".")[0] for name in names} & set(EXTRA) else core).append(block)
    return core, extra


def checks():
    """(what it shows, arguments of Python, environment variables) of every check."""
    for command in ("--version", "info", "methods", "verify --device cpu"):
        yield f"python -m fused_peft {command}", ["-m", "fused_peft", *command.split()], {}
    yield "an adapter comes back from disk", ["-c", SMALL + CHECKPOINT], {}
    yield "Triton's kernels, interpreted, agree with eager", ["-c", SMALL + TRITON], {"TRITON_INTERPRET": "1"}
    pages = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for page, block in ((p.name, block) for p in pages for block in snippets(p.read_text("utf-8"))[0]):
        first = next(line for line in block.splitlines() if line and not line.startswith(("import", "from", "#")))
        yield f"{page}: {first[:60]}", ["-c", block], {}


def main() -> int:
    present = [name for name in (*EXTRA, "pytest") if importlib.util.find_spec(name)]
    if present:
        print(f"{', '.join(present)} is installed here, so this is no bare environment; run `make bare`")
        return 1
    passed = failed = 0
    for name, arguments, variables in checks():
        with tempfile.TemporaryDirectory() as folder:  # not the checkout: the installed package is what is imported
            run = subprocess.run(
                [sys.executable, *arguments], cwd=folder, env={**os.environ, **variables}, capture_output=True,
                text=True, check=False,
            )  # fmt: skip
        wrong = run.returncode != 0 or "Warning" in run.stderr
        passed, failed = passed + (not wrong), failed + wrong
        print(f"{'FAILED' if wrong else 'ok':<6} {name}{os.linesep + run.stdout + run.stderr if wrong else ''}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

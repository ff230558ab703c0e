"""python -m fused_peft, as a user runs it."""

import pytest
import torch

from fused_peft import __main__ as cli
from fused_peft import __version__, verify
from fused_peft.methods import METHODS


def test_info_names_versions_and_backends(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert __version__ in out
    assert torch.__version__ in out
    assert "eager: available" in out


def test_verify_prints_every_method_and_fails_when_a_figure_does(capsys, monkeypatch):
    monkeypatch.setattr(
        verify, "configs", lambda real=verify.configs: {k: v for k, v in real().items() if k in ("lora", "ssb")}
    )
    assert cli.main(["verify", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count("dlora_B") == out.count("dd_out") == 3
    assert "all within their limits" in out
    monkeypatch.setattr(verify, "LIMITS", dict.fromkeys(verify.LIMITS, 1e-12))
    assert cli.main(["verify", "--device", "cpu"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_methods_lists_every_method_with_its_count(capsys):
    assert cli.main(["methods", "--in", "100", "--out", "50", "--r", "4"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.splitlines()[2:]}
    assert set(rows) == set(METHODS)
    assert rows["lora"][-1] == str(4 * 150)
    assert rows["ssb"][-1] == "150"
    assert rows["dora"][-1] == "650"
    assert rows["parallel_adapter"][-2] == "no"
    assert rows["svdiff"][-5:-1] == ["factors", "or", "weight", "yes"]


def test_usage_errors(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main([])
    assert e.value.code == 2
    assert "info" in capsys.readouterr().err

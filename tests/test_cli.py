"""python -m fused_peft, as a user runs it."""

import pytest
import torch

from fused_peft import __main__ as cli
from fused_peft import __version__, verify


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


def test_usage_errors(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main([])
    assert e.value.code == 2
    assert "info" in capsys.readouterr().err

"""`plan`: what it predicts holds, on the command line too."""

from __future__ import annotations

import json
import re
import sys
import types
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_actmem import ActMem, ActMemError, plan
from lightning_actmem.__main__ import main
from tests.integration.support import CLASSES, FEATURES, Net, assert_bit_equal, fit, is_untouched
from tests.models import MlpBlock

BATCH = 512
PEAK_ERROR = 0.05
NOISE_ERROR = 0.15  # bits come in steps of one per site, and a run measures on other batches and weights
WIDTH = 64


class Mlp(Net):
    """Wide enough for the small batches to fill whole groups."""

    def __init__(self, batch_size: int = BATCH, depth: int = 3) -> None:
        super().__init__(samples=2048, batch_size=batch_size)
        blocks = (MlpBlock(WIDTH) for _ in range(depth))
        self.net = nn.Sequential(nn.Linear(FEATURES, WIDTH), *blocks, nn.Linear(WIDTH, CLASSES))


class Deep(Mlp):
    """With an argument that has no default."""

    def __init__(self, depth: int, batch_size: int = BATCH) -> None:
        super().__init__(batch_size, depth)


class Relu(Mlp):
    """ReLU, dropout and a tied weight."""

    def __init__(self, batch_size: int = BATCH) -> None:
        super().__init__(batch_size)
        first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        second.weight = first.weight
        self.net = nn.Sequential(
            nn.Linear(FEATURES, WIDTH), nn.ReLU(), first, nn.Dropout(0.1), second, nn.ReLU(), nn.Linear(WIDTH, CLASSES)
        )


class NoData(LightningModule):
    """Without any data."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = BATCH
        self.net = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("build", [Mlp, Relu])
def test_predicted_stored_bytes_are_those_of_the_ledger(build):
    made = plan(build(), bits=(8, 4, 2), noise=None, trace=(64, 128))
    assert made.batch_size == BATCH
    for bits in (8, 4, 2):
        actmem = ActMem(bits=bits, summary=False)
        model = build()
        fit(model, callbacks=[actmem])
        report = actmem.engine.report()
        predicted = made.method(f"{bits} bits")
        assert predicted.stored_bytes == report.saved_bytes
        assert predicted.raw_bytes == report.raw_bytes
        assert sum(layer.saved_bytes[f"{bits} bits"] for layer in made.layers) == report.stored_bytes


@pytest.mark.slow
@pytest.mark.parametrize("build", [Mlp, Relu])
def test_predicted_peaks_are_those_of_a_plan_made_from_the_batch_itself(build):
    """From batches a quarter and half as large."""
    made = plan(build(), bits=(4,), trace=(BATCH // 4, BATCH // 2))
    measured = plan(build(), bits=(4,), trace=(BATCH // 2, BATCH))
    assert len(made.methods) == (4 if build is Mlp else 3)
    for name in [method.name for method in made.methods]:
        assert made.method(name).peak_bytes == pytest.approx(measured.method(name).peak_bytes, rel=PEAK_ERROR)
    assert made.method("4 bits").peak_bytes < made.method("plain").peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("build", [Mlp, Relu])
def test_the_bits_for_a_noise_store_what_those_of_a_run_do(build):
    """Chosen on batches an eighth and a quarter as large."""
    made = plan(build(), bits=(8,), noise=0.05, checkpointed=(), trace=(BATCH // 8, BATCH // 4))
    actmem = ActMem(noise=0.05, adapt_every=10, summary=False)
    model = build()
    model.samples = 8 * BATCH
    fit(model, callbacks=[actmem], max_steps=40)
    predicted = made.method("noise=0.05").stored_bytes
    assert predicted == pytest.approx(actmem.engine.report().saved_bytes, rel=NOISE_ERROR)
    assert predicted < 0.6 * made.method("8 bits").stored_bytes


class Uncuttable(Mlp):
    """Takes no parts of the batches that it is planned with."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if len(batch[0]) < 32:
            raise ValueError("no half batches here")
        return self.loss(batch)


def test_a_noise_that_cannot_be_measured_is_said():
    made = plan(Uncuttable(depth=1), bits=(4,), checkpointed=(), trace=(32, 48))
    assert [method.name for method in made.methods] == ["plain", "4 bits"]
    reason = made.unpredicted["noise=0.05"]
    assert reason.startswith("no bits could be chosen: ValueError: no half batches")
    assert f"noise=0.05: not predicted, because {reason}." in made.render()


class Once(Mlp):
    """Blocks that save something else every second time that they run."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        for block in self.net[1:4]:
            block.norm.register_forward_hook(self.twist)

    def twist(self, norm: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return output.exp() if self.runs // 3 % 2 else output


def test_blocks_that_cannot_be_checkpointed_cost_their_own_row_only(tmp_path, monkeypatch):
    model = Once()
    made = plan(model, bits=(4,), noise=None, budget="1GiB")
    assert [method.name for method in made.methods] == ["plain", "4 bits"]
    reason = made.unpredicted["checkpoint"]
    assert reason.startswith("CheckpointError: torch.utils.checkpoint: ")
    text = made.render()
    assert re.search(r"^checkpoint( +-){5}$", text, re.MULTILINE)
    assert f"checkpoint: not predicted, because {reason}." in text
    made.save_json(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["unpredicted"] == {"checkpoint": reason}
    drawn = labels_drawn(monkeypatch)
    made.save_figure("plan.png")
    assert drawn == ["plain", "4 bits", "checkpoint: not predicted", "budget", "plan.png"]
    assert not any("forward" in vars(module) for module in model.modules())
    assert is_untouched(model.trainer)


@pytest.mark.parametrize(
    ("config", "bits", "names"),
    [
        ({"codec": "fp8_e4m3"}, (8,), ["plain", "8 bits", "noise=0.05"]),
        ({"bits": 32}, (4,), ["plain", "4 bits", "noise=0.05"]),
        ({"codec": "identity"}, (4,), ["plain", "4 bits"]),
    ],
)
def test_settings_that_leave_bits_no_choice(config, bits, names):
    made = plan(Mlp(depth=1), bits=bits, checkpointed=(), trace=(32, 64), config=config)
    assert [method.name for method in made.methods] == names


def test_a_row_by_bits_has_these_bits_whatever_method_a_run_would_adapt_by():
    made = plan(Mlp(depth=1), bits=(4,), noise=None, checkpointed=(), trace=(32, 64), config={"method": "actnn"})
    plain = plan(Mlp(depth=1), bits=(4,), noise=None, checkpointed=(), trace=(32, 64))
    assert made.method("4 bits").stored_bytes == plain.method("4 bits").stored_bytes
    assert made.notes == ()


def test_repeated_blocks_are_checkpointed_without_being_named():
    made = plan(Mlp(), bits=(), noise=None)
    assert made.method("checkpoint").bytes_per_sample < made.method("plain").bytes_per_sample
    assert made.notes == ("checkpoint: around each of 3 x MlpBlock (net.1, net.2, net.3)",)
    assert plan(Mlp(), bits=(), noise=None, checkpointed=["net.[123]"]).method("checkpoint") == made.methods[-1]


def test_without_repeated_blocks_there_is_nothing_to_checkpoint():
    made = plan(Relu(), bits=(), noise=None)
    assert [method.name for method in made.methods] == ["plain"]
    assert made.notes[0].startswith("checkpoint: none found")


def test_the_model_is_as_before():
    model, before = Mlp(depth=2), Mlp(depth=2)
    model.load_state_dict(before.state_dict())
    state = torch.get_rng_state()
    plan(model, bits=(4,))
    assert_bit_equal(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.batch_size == BATCH
    assert is_untouched(model.trainer)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_budget_checkpointing_text_and_json(tmp_path):
    made = plan(Mlp(), bits=(4,), budget="64MiB", checkpointed=["net.[123]"])
    assert [method.name for method in made.methods] == ["plain", "4 bits", "noise=0.05", "checkpoint"]
    plain, packed, noisy, checkpointed = made.methods
    assert 0 < noisy.stored_bytes < plain.peak_bytes
    assert plain.largest_batch < packed.largest_batch
    assert checkpointed.bytes_per_sample < plain.bytes_per_sample
    assert checkpointed.stored_bytes is None
    text = made.render()
    assert f"batch size {BATCH}" in text
    assert "largest batch in 64.0 MiB" in text
    assert "net.1.norm" in text
    assert re.search(r"^noise=0\.05: \d\.\d\d bits per element .* noise 0\.0\d+ as measured", text, re.MULTILINE)
    made.save_json(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["methods"][2]["name"] == "noise=0.05"


def test_a_figure_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    made = plan(Mlp(depth=1), bits=(4,), noise=None)
    with pytest.raises(ActMemError, match="pip install matplotlib"):
        made.save_figure(tmp_path / "plan.png")


def labels_drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What will be drawn instead of by matplotlib: labels, and the file at last."""
    drawn: list[Any] = []
    axes = types.SimpleNamespace(
        plot=lambda *a, label: drawn.append(label),
        axhline=lambda *a, **k: drawn.append(k["label"]),
        set_ylim=lambda *a: None,
        set=lambda **k: None,
        legend=lambda: None,
    )
    figure = types.SimpleNamespace(subplots=lambda: axes, savefig=drawn.append)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", types.SimpleNamespace(Figure=lambda **k: figure))
    return drawn


def test_a_figure_has_a_line_for_each_method(tmp_path, monkeypatch):
    drawn = labels_drawn(monkeypatch)
    plan(Mlp(depth=2), bits=(4,), noise=None, budget="1GiB").save_figure("plan.png")
    assert drawn == ["plain", "4 bits", "checkpoint", "budget", "plan.png"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"trace": (64, 32)}, ValueError, "two batch sizes, the smaller one first, got \\[64, 32\\]"),
        ({"trace": (32,)}, ValueError, "exactly two batch sizes, .* got \\[32\\]"),
        ({"trace": (8, 16, 32)}, ValueError, "exactly two batch sizes, .* got \\[8, 16, 32\\]"),
        ({"noise": 0.0}, ValueError, "noise must be above 0 and finite, got 0.0"),
        ({"batch_size": 0}, ValueError, "batch_size must be 1 or more, got 0"),
        ({"trace": (32, 4096)}, ActMemError, "within the 2048 samples of the data"),
        ({"checkpointed": ["nothing"]}, ValueError, "must match submodules of the model, got \\['nothing'\\]"),
        ({"budget": "lots"}, ValueError, "like '4GiB'"),
        ({"config": {"offload": "lots"}}, ValueError, "offload must be true, false or the bytes .* got 'lots'"),
        ({"config": {"offload": 0.5}}, TypeError, "offload: Value '0.5' of type 'float'"),
        ({"config": {"adapt_every": -1}}, ValueError, "adapt_every must be 0 or more, got -1"),
        ({"batch_arg_name": "samples_per_step"}, ActMemError, "attribute 'samples_per_step'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        plan(Mlp(depth=1), bits=(), **{"noise": None, **arguments})


def test_the_error_by_which_memory_ran_out_is_named():
    class Broken(Mlp):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("my table is out of memory cells")

    with pytest.raises(ActMemError, match=r"ran out with the small batches .* RuntimeError: my table is") as caught:
        plan(Broken(depth=1), bits=(), noise=None)
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestCommandLine:
    """``python -m lightning_actmem plan``."""

    MODEL = "tests.integration.test_plan.Mlp"

    def test_class_path_with_arguments(self, capsys, tmp_path):
        path = tmp_path / "plan.json"
        model = ["--model", self.MODEL, "--model.depth", "1"]
        main(["plan", *model, "--bits", "4", "--noise", "0.1", "--json", str(path)])
        out = capsys.readouterr().out
        assert "4 bits" in out
        assert "noise=0.1" in out
        assert json.loads(path.read_text())["batch_size"] == BATCH

    @pytest.mark.parametrize("in_file", [False, True], ids=["command line alone", "the rest in a file"])
    def test_an_argument_without_default(self, in_file, capsys, tmp_path):
        """It was missed before the command line's own arguments were looked at."""
        name, path = "tests.integration.test_plan.Deep", tmp_path / "run.yaml"
        path.write_text(f"model: {{class_path: {name}, init_args: {{batch_size: 96}}}}\n")
        model = ["--config", str(path)] if in_file else ["--model", name, "--model.batch_size", "96"]
        main(["plan", *model, "--model.depth", "2", "--bits", "4", "--noise", "0"])
        out = capsys.readouterr().out
        assert "2 x MlpBlock" in out
        assert "batch size 96" in out

    def test_a_lightning_cli_configuration(self, capsys, tmp_path):
        path = tmp_path / "run.yaml"
        path.write_text(
            f"trainer: {{devices: 8}}\nmodel: {{class_path: {self.MODEL}, init_args: {{batch_size: 96}}}}\n"
        )
        main(["plan", "--config", str(path), "--bits", "2", "--noise", "0", "--budget", "1073741824"])
        out = capsys.readouterr().out
        assert "noise" not in out
        assert "3 x MlpBlock" in out
        assert "batch size 96" in out
        assert "2 bits" in out
        assert "largest batch in 1.0 GiB" in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "a model is needed"),
            (["--model", "no.such.Model"], "no.such.Model"),
            (["--model", MODEL, "--budget", "1KB", "--trace", "9", "3"], "the smaller one first"),
            (["--model", MODEL, "--batch-size", "-3"], "batch_size must be 1 or more, got -3"),
            (["--model", "tests.integration.test_plan.NoData"], "train_dataloader"),
            (["--model", MODEL, "--model.depth", "1", "--bits", "8", "--json", "."], "Is a directory"),
            (["--config", "."], "Is a directory"),
        ],
    )
    def test_errors_are_one_line(self, arguments, message, capsys):
        with pytest.raises(SystemExit):
            main(["plan", *arguments])
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("- model\n", "must have sections such as `model` and `data`, got a list"),
            ("model: {class_path: [\n", "while parsing a flow"),
            ("model: ${nowhere}\n", "nowhere"),
            ("3\n", "error: Invalid loaded object type"),
        ],
    )
    def test_a_bad_configuration_is_an_error_line(self, text, message, capsys, tmp_path):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        with pytest.raises(SystemExit):
            main(["plan", "--config", str(path)])
        assert message in capsys.readouterr().err

"""The benchmark: what it calls stored, what it calls peak, and the rows that it leaves."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import memory, results
from benchmarks.measure import peak_bytes, quantiles_20_50_80
from benchmarks.methods import ActMem, Checkpoint, Method, SaveOnCpu, all_methods
from benchmarks.models import CHAIN_OPERATIONS, CLASSES, MODELS, workload
from benchmarks.results import COLUMNS, append
from lightning_actmem.saved.offload import Offload
from tests.saved.slow_transport import SlowTransport

BATCHES = {"mlp": 256, "gpt2": 1, "bert": 1, "resnet18": 2, "resnet50": 2, "chain": 1}
LOSS_BYTES_PER_SAMPLE = 4 * CLASSES  # the log-softmax
TOTAL_WEIGHT_BYTES = 4


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_plain_stores_the_raw_bytes_of_the_ledger(name: str, autocast: bool) -> None:
    work = workload(name, BATCHES[name], autocast=autocast)
    packed = ActMem(bits=32)
    saved_bytes = packed.stored(work).device_bytes
    assert packed.engine.report().raw_bytes == Method().stored(work).device_bytes
    assert saved_bytes <= packed.engine.report().raw_bytes  # masks and pool indices are narrowed even at 32 bits


def test_bytes_that_can_be_counted_by_hand() -> None:
    stored = Method().stored(workload("chain"))
    assert stored.device_bytes == 4 * CLASSES * CHAIN_OPERATIONS + LOSS_BYTES_PER_SAMPLE + TOTAL_WEIGHT_BYTES
    assert stored.host_bytes == 0


def test_checkpoint_stores_the_inputs_of_the_blocks() -> None:
    work = workload("mlp", 64)
    saved = Checkpoint().stored(work).device_bytes
    activation_bytes = 4 * work.inputs.numel()
    boundaries = (len(work.blocks) - 1) * activation_bytes  # the first block's input is the batch
    last_norm = 2 * activation_bytes + 2 * 4 * 64  # its input and output, a mean and a deviation per row
    assert saved == boundaries + last_norm + 64 * LOSS_BYTES_PER_SAMPLE + TOTAL_WEIGHT_BYTES


@pytest.mark.parametrize("method", [Checkpoint(), SaveOnCpu(), ActMem(bits=32)], ids=lambda method: method.name)
def test_lossless_methods_give_the_gradients_of_plain_training(method: Method) -> None:
    work = workload("mlp", 32)
    gradients = []
    for each in (Method(), method):
        work.model.zero_grad()
        each.step(work)
        gradients.append([parameter.grad for parameter in work.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not any("forward" in vars(module) for module in work.model.modules())


def test_peak_of_packed_is_below_plain_and_above_what_it_stores() -> None:
    work = workload("mlp", 256)
    for method in (Method(), ActMem(bits=4)):  # the first packed step of a process computes tables
        method.step(work)
    peaks = {method.bits: peak_bytes(work, method) for method in (Method(), ActMem(bits=4))}
    assert Method().stored(work).device_bytes <= peaks[None]
    assert ActMem(bits=4).stored(work).device_bytes <= peaks[4] < peaks[None]


@pytest.mark.gpu
def test_on_a_gpu_save_on_cpu_moves_the_bytes_to_the_host() -> None:
    work = workload("mlp", 256, "cuda")
    moved, plain = SaveOnCpu().stored(work), Method().stored(work)
    assert moved.device_bytes == 0
    assert moved.host_bytes >= plain.device_bytes
    Method().step(work)
    assert peak_bytes(work, ActMem(bits=4)) < peak_bytes(work, Method())


def test_what_moves_is_counted_where_it_is() -> None:
    work, actmem = workload("mlp", 256), ActMem(bits=4)
    all_bytes = actmem.stored(work).device_bytes
    actmem.engine._store.offload = Offload(actmem.engine.ledger, 0, SlowTransport(), parcel_bytes=4096, least_bytes=512)
    stored = actmem.stored(work)
    assert stored.device_bytes < all_bytes
    assert all_bytes <= stored.device_bytes + stored.host_bytes


@pytest.mark.gpu
def test_offload_on_a_gpu() -> None:
    (row,) = (row for row in memory.measure("gpt2", 64, "cuda", bits=(8,), offload=True) if row.method == "actmem")
    assert row.host_bytes > 0
    assert row.note == "offload=True"


def test_rows_of_every_method() -> None:
    rows = memory.measure("mlp", batch=64, bits=(8, 2), repeats=1)
    assert [(row.method, row.bits) for row in rows] == [(method.name, method.bits) for method in all_methods((8, 2))]
    plain, eight, two, checkpointed, moved = rows
    assert plain.stored_bytes > eight.stored_bytes > two.stored_bytes > (two.exact_bytes or 0) > 0
    assert plain.ratio == moved.ratio == 1.0
    assert eight.ratio == pytest.approx(plain.stored_bytes / eight.stored_bytes, abs=1e-3)
    assert checkpointed.stored_bytes < plain.stored_bytes == moved.stored_bytes
    assert "no-op" in moved.note
    assert all(0 < row.step_ms_20 <= row.step_ms <= row.step_ms_80 for row in rows)
    assert all(row.device and row.torch == torch.__version__ for row in rows)


def test_other_settings_are_noted() -> None:
    stores_less, stores_all = (
        next(row for row in memory.measure("mlp", batch=64, repeats=1, **fields) if row.method == "actmem")
        for fields in ({}, {"derive": False})
    )
    assert (stores_less.note, stores_all.note) == ("", "derive=False")
    assert stores_less.stored_bytes < stores_all.stored_bytes


def test_overhead_per_operation() -> None:
    plain, *packed, codec, bare = memory.measure("chain", repeats=1)
    assert [(row.bits, row.note) for row in packed] == [(32, ""), (4, ""), (4, "codec=identity, min_elements=0")]
    assert (plain.us_per_op or 0) == pytest.approx(1e3 * plain.step_ms / CHAIN_OPERATIONS, abs=0.01)
    assert all(row.stored_bytes == plain.stored_bytes for row in packed)
    assert codec.stored_bytes == 4 * CLASSES * CHAIN_OPERATIONS
    assert bare.stored_bytes == plain.stored_bytes
    line = memory.overhead([plain, *packed, codec, bare])
    assert f"{(packed[1].us_per_op or 0) - (plain.us_per_op or 0):.1f} us at bits=4, " in line
    beyond = (packed[2].us_per_op or 0) - (plain.us_per_op or 0) - (codec.us_per_op or 0)
    assert f", {beyond:.1f} us at bits=4 (codec=identity, min_elements=0). " in line
    assert line.endswith(f" {(bare.us_per_op or 0) - (plain.us_per_op or 0):.1f} us")


def test_the_program_appends_to_the_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.csv"
    for _ in range(2):
        memory.main(["--model", "chain", "--repeats", "1", "--csv", str(path)])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["method"] for row in rows] == ["plain", "actmem", "actmem", "actmem", "copy alone", "bare hooks"] * 2
    assert "overhead per operation" in capsys.readouterr().out


def test_a_csv_with_other_columns_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("other,columns\n")
    with pytest.raises(ValueError, match=r"must have the columns .* got .*other.* Name another file"):
        append(path, [])
    assert path.read_text() == "other,columns\n"


def test_the_results_in_the_repository_have_these_columns() -> None:
    with memory.CSV.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert {"mlp", "gpt2", "resnet50"} <= {row["model"] for row in rows}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        memory.main(["--device", "cuda"])
    assert "needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--bits", "5"], "invalid choice: 5"),
        (["--repeats", "0"], "must be 1 or more, got 0"),
        (["--offload", "2GiB"], "--offload needs --device cuda"),
    ],
    ids=["bits", "repeats", "offload"],
)
def test_bad_options(option: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        memory.arguments(option)
    assert message in capsys.readouterr().err


def test_quantiles() -> None:
    assert quantiles_20_50_80([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)


def test_a_missing_package_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise results.PackageNotFoundError(name)

    monkeypatch.setattr(results, "version", missing)
    assert results.environment(torch.device("cpu"))["triton"] == ""

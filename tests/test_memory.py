"""Out of memory is not the end of a trial: fewer images at once, the same batch; injected, and real on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import medtune.models
from medtune.config import TrialConfig
from medtune.data import PairData
from medtune.epoch import pieces
from medtune.errors import MachineFault
from medtune.evaluate import predict
from medtune.memory import OutOfMemory, Remembered, is_out_of_memory, limit_memory, used
from medtune.parallel import Group
from medtune.search.conductor import attempt_folder
from medtune.steps import broken_recording
from medtune.tracking import read_epochs, read_events, read_final
from medtune.training import fit
from medtune.trial import Attempt
from tests.conftest import TinyNet
from tests.support.group_process import train
from tests.test_trial import spec

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread", "small_data")
Make = Callable[..., TrialConfig]


class Small(TinyNet):
    """A model for a device that holds `most` images in training."""

    most = 4
    tried: list[int]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        type(self).tried.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {len(images)} GiB")
        return super().forward(images)


@pytest.fixture
def device(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> type[Small]:
    """Makes "tiny" a model that does not fit with more than `most` images."""

    class Fresh(Small):
        pass

    Fresh.tried = []
    monkeypatch.setattr(medtune.models, "build", lambda name, num_classes, in_channels, **_: Fresh(num_classes, in_channels))
    return Fresh


def play(make: Make, folder: Path, number: int, config: TrialConfig) -> tuple[list[Any], int]:
    """Attempts as the conductor starts them, until one ends the trial; all reports, and the last attempt's number."""
    reports: list[Any] = []
    micro, attempt = None, 0
    while not reports or reports[-1].status in ("running", "out_of_memory"):
        if not reports or reports[-1].status == "out_of_memory":
            attempt += 1
            assert attempt < 9
            running = Attempt(spec(config, folder, attempt, number=number, micro_batch=micro))
        reports.append(running.next_report())
        if reports[-1].status == "out_of_memory":
            micro = reports[-1].micro_batch
            running.close()
    return reports, attempt


def test_halved_until_it_fits_and_remembered(tiny_config: Make, device: type[Small], tmp_path: Path) -> None:
    config = tiny_config(train_limit=32, external_limit=16, resamples=20)
    study = tmp_path / "study"
    reports, attempt = play(tiny_config, study, 1, config)
    assert [r.micro_batch for r in reports] == [8, 4, 4, 4, 4, 4] and attempt == 3
    assert reports[-1].status == "complete" and reports[-1].micro_batch == 4
    folder = attempt_folder(study / "trials", 1, 3)
    (told,) = [event["message"] for event in read_events(folder) if event["kind"] == "micro_batch"]
    assert "4 images at once; gradients add up to batch 16" in told and "BatchNorm's statistics are those of 4" in told
    failed = [event["message"] for event in read_events(attempt_folder(study / "trials", 1, 1))]
    assert any("tiny at 28 px (batch 16): 16 images at once do not fit into the memory of cpu" in text for text in failed)
    assert [line["micro_batch"] for line in read_epochs(folder)] == [4, 4, 4, 4]

    device.tried.clear()
    reports, attempt = play(tiny_config, study, 2, config)
    assert attempt == 1 and reports[-1].status == "complete"
    assert max(device.tried[:8]) == 4  # the next trial began with what fits
    other = tiny_config(train_limit=32, image_size=32)
    assert Remembered(tmp_path / "micro-batches", other, CPU).read() is None


def test_halving_ends_at_two(tiny_config: Make, device: type[Small], tmp_path: Path) -> None:
    """24, 12, 6, 3, and not 1, which BatchNorm could not work with."""
    device.most = 2
    config = tiny_config(train_limit=32, external_limit=16, resamples=20, batch_size=24)
    reports, attempt = play(tiny_config, tmp_path / "study", 1, config)
    assert [r.micro_batch for r in reports] == [12, 6, 3, 2, 2, 2, 2, 2] and attempt == 5
    assert play(tiny_config, tmp_path / "study", 2, config)[1] == 1


def test_memory_that_runs_out_in_a_test_starts_another_attempt(
    tiny_config: Make, device: type[Small], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.most = 99

    def full(*args: Any, **settings: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = tiny_config(train_limit=32, external_limit=16, resamples=20)
    attempt = Attempt(spec(config, tmp_path / "study"))
    monkeypatch.setattr("medtune.trial.external_test", full)
    assert attempt.next_report().status == "out_of_memory"
    monkeypatch.setattr("medtune.trial.fit", full)
    report = Attempt(spec(config, tmp_path / "study", 2)).next_report()
    assert report.status == "fail" and "tiny and the images of synthetic (0.0 GiB) do not fit" in str(report.cause)


def test_what_a_neighbour_took_is_not_remembered(tiny_config: Make, device: type[Small], tmp_path: Path) -> None:
    device.most = 99
    first = Attempt(spec(tiny_config(train_limit=32, external_limit=16), tmp_path / "study"))
    first.next_report()
    device.most = 8
    assert first.next_report().status == "out_of_memory"
    assert not list((tmp_path / "micro-batches").glob("*"))


def test_a_machine_fault_is_not_the_trials_own_failure(
    tiny_config: Make, device: type[Small], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Group, "gather", lambda self, value: [value, (9, None)])
    with pytest.raises(MachineFault, match="found different checkpoints; this one found epoch 0"):
        Attempt(spec(tiny_config(train_limit=32), tmp_path / "study")).next_report()


def test_two_images_that_do_not_fit_fail_the_trial_with_the_sizes(
    tiny_config: Make, device: type[Small], tmp_path: Path
) -> None:
    device.most = 1
    config = tiny_config(train_limit=32, external_limit=16, resamples=20)
    reports, attempt = play(tiny_config, tmp_path / "study", 1, config)
    assert reports[-1].status == "fail" and attempt == 4
    said = "OutOfMemory: tiny at 28 px (batch 16) does not fit into the memory of cpu, not even 2 images at once"
    assert reports[-1].cause.startswith(said)
    assert "--activation-checkpointing" in reports[-1].cause
    final = read_final(attempt_folder(tmp_path / "study" / "trials", 1, attempt))
    assert final is not None and final["status"] == "fail"


def test_it_goes_on_from_the_last_checkpoint(tiny_config: Make, device: type[Small], tmp_path: Path) -> None:
    """A neighbour on the card took memory in mid-trial."""
    device.most = 99
    config = tiny_config(train_limit=32, external_limit=16, resamples=20)
    first = Attempt(spec(config, tmp_path / "study"))
    assert [first.next_report().epoch for _ in range(2)] == [1, 2]
    device.most = 8
    report = first.next_report()
    assert (report.status, report.micro_batch) == ("out_of_memory", 8)
    first.close()
    second = Attempt(spec(config, tmp_path / "study", 2, micro_batch=8))
    assert second.next_report().epoch == 3


@pytest.mark.parametrize("model", ["medmamba_t", "resnet50"])
def test_pieces_add_up_to_the_batch(model: str) -> None:
    """Stochastic depth off and BatchNorm frozen: the same weights, whatever is computed at once."""
    whole, parts = train(model, 1, batch_size=6), train(model, 1, batch_size=6, micro_batch=2)
    assert (whole.micro_batch, parts.micro_batch) == (6, 2)
    for (name, wanted), found in zip(whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_a_resumed_trial_keeps_its_pieces(tiny_config: Make, tiny_data: PairData, tmp_path: Path) -> None:
    from medtune.checkpoint import CheckpointStore

    config = tiny_config()
    next(fit(config, tiny_data, device=CPU, checkpoints=CheckpointStore(tmp_path), micro_batch=4))
    resumed = fit(config, tiny_data, device=CPU, checkpoints=CheckpointStore(tmp_path))
    assert resumed.start_epoch == 2 and resumed.micro_batch == 4


def test_pieces_are_even_and_never_of_one_image() -> None:
    assert pieces(10, 26, None) == [(10, 26)] == pieces(10, 26, 16)
    assert pieces(0, 17, 8) == [(0, 5), (5, 11), (11, 17)]
    for count in range(2, 40):
        for most in range(2, 12):
            found = pieces(3, 3 + count, most)
            assert found[0][0] == 3 and found[-1][1] == 3 + count
            sizes = [stop - start for start, stop in found]
            assert min(sizes) >= 2 and max(sizes) <= max(most, 3)


def test_all_processes_compute_as_many_pieces() -> None:
    """Synchronised BatchNorm waits for all of them at each."""
    for world, count, most in itertools.product((2, 3, 4), range(8, 70), (2, 3, 5, 8, 16, None)):
        shares = [pieces(0, count, most, Group(rank, world)) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        assert [i for share in shares for start, stop in share for i in range(start, stop)] == list(range(count))
        assert all(stop - start >= 2 for share in shares for start, stop in share)
        assert all(stop - start <= (most or count) + 1 + (most == 2) for share in shares for start, stop in share)


def test_other_errors_are_no_memory_errors() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit")) and not is_out_of_memory(ValueError("out of memory"))


def test_evaluation_takes_what_fits(device: type[Small], tiny_data: PairData) -> None:
    torch.manual_seed(0)
    model = device(2, 3).eval()
    device.most = 99
    whole = predict(model, tiny_data.external, 28, CPU)
    device.most = 3
    device.tried.clear()
    assert torch.allclose(predict(model, tiny_data.external, 28, CPU), whole, atol=1e-6)
    assert device.tried[:5] == [30, 15, 7, 3, 3]
    device.most = 0
    with pytest.raises(torch.OutOfMemoryError):
        predict(model, tiny_data.external, 28, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_with_little_memory(tmp_path: Path, tiny_data: PairData) -> None:
    """A cap on the process's memory that MedMamba-t's batch at 224 px does not keep to at once."""
    if broken_recording():
        pytest.skip("an allocator that believes in a recording, of another test's, keeps to no cap")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.5 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    try:
        config = TrialConfig(model="medmamba_t", pair="synthetic", epochs=1, batch_size=64)
        micro = None
        for _ in range(6):
            run = fit(config, tiny_data, device=torch.device("cuda"), micro_batch=micro)
            try:
                result = next(run)
                break
            except OutOfMemory as error:
                micro = error.fits
            finally:
                run.close()
        assert micro is not None and result.micro_batch == micro
        assert result.epoch == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_trial_that_is_to_be_measured_is_tested_at_once_and_leaves_a_checkpoint(
    tiny_config: Make, device: type[Small], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the next attempt, in its part of a card, goes on after the epoch that was measured."""
    device.most = 99
    monkeypatch.setattr("medtune.trial.used", lambda device: {"kind": "H100", "card": 80, "reserved": 8, "overhead": 1})
    config = tiny_config(train_limit=32, external_limit=16, resamples=20, checkpoint_seconds=1000.0)
    first = Attempt(spec(config, tmp_path / "study", rungs=(), measure=True))
    report = first.next_report()
    assert (report.status, report.epoch, report.external["epoch"]) == ("running", 1, 1)
    assert report.memory == {"kind": "H100", "card": 80, "reserved": 8, "overhead": 1}
    first.close()
    second = Attempt(spec(config, tmp_path / "study", 2, rungs=(), memory_cap=0.2))
    report = second.next_report()
    assert report.epoch == 2 and report.memory is None, "of a card with neighbours nothing is told"


def test_what_did_not_fit_into_a_part_of_a_card_says_nothing_of_the_card(
    tiny_config: Make, device: type[Small], tmp_path: Path
) -> None:
    config = tiny_config(train_limit=32, external_limit=16, resamples=20)
    assert Attempt(spec(config, tmp_path / "study", memory_cap=0.2)).next_report().status == "out_of_memory"
    assert not list((tmp_path / "micro-batches").glob("*"))


def test_a_processor_has_no_memory_to_be_shared() -> None:
    limit_memory(CPU, 0.5)
    assert used(CPU) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_process_keeps_to_its_part_of_a_gpu() -> None:
    """Its tensors and what CUDA takes beside them, as the driver counts them for the whole card."""
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    limit_memory(device, 0.05)
    try:
        kept = torch.empty(int(total * 0.03), dtype=torch.uint8, device=device)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(total * 0.03), dtype=torch.uint8, device=device)
        found = used(device)
        assert found is not None and found["reserved"] >= kept.nbytes and found["reserved"] <= total * 0.05
        assert 0 < found["overhead"] < 4 * 2**30
    finally:
        limit_memory(device, None)

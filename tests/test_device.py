"""A run of each script on a pretended GPU, for machines without one: its tensors lie in memory but say that they are on "gpu:0".

An operator that meets one of them and a CPU tensor raises, as CUDA's would; so does drawing on the GPU from a CPU generator. What it
cannot show: speed, CUDA's own kernels, bf16, several GPUs. PyTorch's hooks for backends written in Python are experimental.
"""

import json
import pathlib
import re
import subprocess
import sys
import traceback
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

TAKES_BOTH = ("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_")  # indices may be on the CPU


class OnGPU(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            device="gpu:0",
            storage_offset=inner.storage_offset(),
        )

    def __init__(self, inner):
        self.inner = inner

    is_cuda = property(lambda self: True)
    tolist = lambda self: self.detach().cpu().tolist()
    __reduce_ex__ = lambda self, protocol: self.detach().cpu().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class PretendGPU(TorchDispatchMode):
    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function, args, kwargs):
    """The operator on the tensors inside; its results are where its inputs were, or where `device` sends them."""
    name, tensors = (
        function._schema.name.removeprefix("aten::"),
        [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)],
    )
    on_gpu, rest = (
        [x for x in tensors if isinstance(x, OnGPU)],
        [x for x in tensors if not isinstance(x, OnGPU) and x.dim()],
    )
    if on_gpu and rest and (name not in TAKES_BOTH or name == "index" and not isinstance(tensors[0], OnGPU)):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    target = torch.device(kwargs.get("device") or ("gpu:0" if on_gpu else "cpu")).type
    if name == "copy_":
        target = args[0].device.type
    if target == "gpu" and kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: expected a generator of the GPU")
    if name == "_fused_sdp_choice":
        return 0  # scaled_dot_product_attention by plain operators
    if kwargs.get("device") is not None:
        kwargs = dict(kwargs, device=torch.device("cpu"))
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, OnGPU) else x, (args, kwargs))
    known = {id(x.inner): x for x in on_gpu}  # in-place operators return what they were given
    wrap = lambda x: known[id(x)] if id(x) in known else OnGPU(x)
    return tree_map(
        lambda x: wrap(x) if isinstance(x, torch.Tensor) and target == "gpu" else x, function(*args, **kwargs)
    )


def pretend():
    """This process has a GPU from here on."""
    import accelerate
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("gpu")
    torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) makes a CPU tensor and sends it
    with torch.device("cpu"):
        torch.empty(
            0
        )  # now the device contexts know the real torch.tensor: else transformers leaves rotary frequencies as they lie
    tensor = torch.tensor  # of a list of tensors, it reads them below the dispatcher
    torch.tensor = lambda data, **options: tensor(
        tree_map(lambda x: x.item() if isinstance(x, OnGPU) else x, data), **options
    )
    torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter stays the same object, as on CUDA
    accelerate.Accelerator.device = property(lambda self: torch.device("gpu:0"))


def main(script, flags, change):
    """A script's main as on a GPU, but for what this file cannot pretend: saving reads storages."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True), GradientState._reset_state()
    text = re.sub(
        r"torch\.cuda\.is_bf16_supported\((including_emulation=)?False\)", "False", pathlib.Path(script).read_text()
    )
    assert "is_bf16_supported" not in text
    for a, b in (("torch.cuda.is_available()", "True"), change or ("", "")):
        assert a in text
        text = text.replace(a, b)
    module, sys.argv = types.ModuleType("script"), [script, *flags]
    module.__file__, sys.modules["script"] = script, module
    exec(compile(text, script, "exec"), module.__dict__)
    (save,) = {"save", "save_checkpoint"} & vars(module).keys()  # in the RL scripts it has the longer name
    setattr(module, save, lambda path, *_, **__: path.mkdir(parents=True))
    with PretendGPU():
        module.main(module.parse_args())


RUNS = {
    name: (f"{name}.py", (), None)
    for name in ("reinforce", "rloo", "ppo", "dpo", "reward_model", "reward_model_ordinal")
}
RUNS["simpo"] = "dpo.py", ("--loss-type", "simpo"), None
RUNS["margin"] = "reward_model.py", ("--margin",), None
RUNS["left behind"] = "rloo.py", (), ("uniforms = uniforms.to(device)", "pass")


@pytest.fixture(scope="module")
def errors(tiny, tiny_flags, tmp_path_factory):
    """What each run ended with, None being well. All in one process that is not this one."""
    folder = tmp_path_factory.mktemp("device")
    rows = [
        dict(prompt=f"q{i}", chosen="abc" + "d" * (i % 3), rejected=x, chosen_rating=3, rejected_rating=len(x))
        for i in range(8)
        for x in ("1", "23")
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = ["--eval-prompts", "4", "--prompts-per-step", "2", "--micro-batch-size", "1"]
    rl = [*tiny_flags, *few, "--total-steps", "1", "--max-new-tokens", "4"]
    pairs = ["--model", tiny, "--dataset", str(folder / "pairs.jsonl"), "--precision", "fp32", *few]
    of_dpo = [flag.replace("--prompts-per-step", "--pairs-per-step") for flag in pairs] + [
        "--max-new-tokens",
        "4",
        "--total-steps",
        "2",
    ]
    flags = {
        "reinforce.py": rl,
        "rloo.py": rl,
        "ppo.py": rl,
        "dpo.py": of_dpo,
        "reward_model.py": pairs,
        "reward_model_ordinal.py": pairs,
    }
    jobs = [
        (
            str(pathlib.Path(__file__).parent.parent / script),
            [*flags[script], *more, "--output-dir", str(folder / name)],
            change,
        )
        for name, (script, more, change) in RUNS.items()
    ]
    (folder / "jobs").write_text(json.dumps(jobs))
    result = subprocess.run([sys.executable, __file__, str(folder / "jobs")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(zip(RUNS, json.loads((folder / "jobs").read_text())))


pytestmark = pytest.mark.skipif(not hasattr(torch._C, "_acc"), reason="this PyTorch has no backends in Python")


@pytest.mark.parametrize("name", list(RUNS)[:-1])
def test_no_operator_of_a_run_mixes_devices(errors, name):
    assert errors[name] is None, errors[name]


def test_a_tensor_that_stays_behind_is_found(errors):
    assert "expected all tensors to be on the same device" in errors["left behind"]


if __name__ == "__main__":
    pretend()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN, so that what nobody wrote is found
    ends, path = [], pathlib.Path(sys.argv[1])
    for job in json.loads(path.read_text()):
        try:
            ends.append(main(*job))
        except (Exception, SystemExit):
            ends.append(traceback.format_exc())
    path.write_text(json.dumps(ends))

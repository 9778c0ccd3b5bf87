"""CUDA device made of CPU memory, for a CPU build of torch: real values, CUDA's rules, a log of copies and waits.

A tensor on `cuda:0` is a wrapper around a CPU tensor, on which its operations run. What CUDA refuses is refused:
tensors of two devices in one operation, and `numpy()` of a tensor on the device. Autocast and GradScaler act as on
CUDA. What would copy between host and device, or let the host wait for the device, is logged with the place that asked
for it. Speed, memory, streams, kernels and rounding of a real GPU are not modeled.

A test in this folder is an ordinary test with the fixture `cuda`:

    def test_a_tuner_follows_its_base(cuda):
        unet.to("cuda")
        with cuda.phase("step"):
            output = unet(latents.to("cuda"), ...)
        assert cuda.waits("step") == []
        assert torch.allclose(on_host(output), expected)

The device must be prepared before torch is imported. Therefore `conftest.py` runs the tests of each file in one
process of its own, and reports each result as if it had run here. Without a C++ compiler they are skipped. To run them
directly, for example with a debugger:

    python -m tests.integration.cuda.standin tests/integration/cuda/test_device.py -k follows --pdb

A script calls `load_guard(compiled_guard())` before `import torch`, and then uses `standin.device.cuda_device`. With
the guard loaded, FakeTensor has a `cuda` device too.
"""

from .guard import compiled_guard, load_guard, loaded

__all__ = ["compiled_guard", "load_guard", "loaded"]

import torch

from restune_diffusion import (
    TunerManager,
    attach,
)

from ...unit.hooks.test_attachment import KINDS, run, trained


@KINDS
def test_a_compiled_graph_follows_the_weights_without_compiling_again(unet, inputs, config):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with attach(unet, trained(unet, config)), torch.no_grad():
        compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
        for weight in (1.0, 0.5, -0.25):
            TunerManager.of(unet).set_weights({"default": weight})
            assert torch.equal(compiled(*inputs).sample, run(unet, inputs))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

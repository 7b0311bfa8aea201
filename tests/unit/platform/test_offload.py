import torch

from megavlm.platform.offload import CpuOffload


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))


def gradients(modules: torch.nn.Sequential, inputs: torch.Tensor, offload: CpuOffload | None) -> list[torch.Tensor]:
    modules.zero_grad()
    if offload is None:
        output = modules(inputs)
    else:
        with offload():
            output = modules(inputs)
    output.square().sum().backward()
    return [parameter.grad.clone() for parameter in modules.parameters() if parameter.grad is not None]


def test_gradients_are_the_same_and_activations_were_away() -> None:
    modules, inputs = model(), torch.randn(32, 8)
    offload = CpuOffload([modules], least_bytes=1)
    for found, expected in zip(gradients(modules, inputs, offload), gradients(modules, inputs, None), strict=True):
        assert torch.equal(found, expected)
    # the input of the first layer, that of GELU and of the last layer, 32 rows each in fp32; no weight
    assert offload.num_bytes == 32 * (8 + 16 + 16) * 4


def test_small_tensors_stay() -> None:
    modules, inputs = model(), torch.randn(32, 8)
    offload = CpuOffload([modules], least_bytes=32 * 16 * 4)
    gradients(modules, inputs, offload)
    assert offload.num_bytes == 32 * (16 + 16) * 4


def test_what_changes_behind_a_forward_pass_changes_no_gradient() -> None:
    """The copy is made at once: the buffer that an activation came in may be used again."""
    modules, inputs = model(), torch.randn(32, 8)
    expected = gradients(modules, inputs, None)
    modules.zero_grad()
    buffer = inputs.clone()
    with CpuOffload([modules], least_bytes=1)():
        output = modules(buffer)
    with torch.no_grad():
        buffer.zero_()
    output.square().sum().backward()
    for parameter, gradient in zip(modules.parameters(), expected, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, gradient)

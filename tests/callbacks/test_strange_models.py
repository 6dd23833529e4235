"""Models that quantization was not written for: each deploys exactly, lists what stays float, or says what is wrong."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimtrain.callbacks import LSQQuantizer, WeightQuantizer
from slimtrain.callbacks.operations import tensors_in
from slimtrain.core import LayerState

IMAGE = (2, 3, 8, 8)


def images(*shape):
    return torch.randn(shape or IMAGE)


class Net(nn.Module):
    """Layers by name and a forward given as a function of the module and its inputs."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args):
        return self.function(self, *args)


def tied_to_embedding():
    net = Net(lambda m, x: m.out(F.relu(m.hidden(m.table(x)))), table=nn.Embedding(20, 16), hidden=nn.Linear(16, 16),
              out=nn.Linear(16, 20, bias=False))
    net.out.weight = net.table.weight
    return net, torch.randint(0, 20, (2, 5))


def tied_linears():
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    net.b.weight = net.a.weight
    return net, images(4, 16)


def tied_without_bias():
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(16, 16, bias=False), b=nn.Linear(16, 16, bias=False))
    net.b.weight = net.a.weight
    return net, images(4, 16)


def transformer():
    return Net(lambda m, x: m.out(m.block(x)), block=nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
               out=nn.Linear(16, 4)), images(2, 5, 16)


def attention_by_hand():
    def forward(m, x):
        q, k, v = m.qkv(m.norm(x)).reshape(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / 8 ** 0.5).softmax(-1)
        return x + m.out((attention @ v).transpose(1, 2).reshape(2, 5, 16))

    return Net(forward, qkv=nn.Linear(16, 48), norm=nn.LayerNorm(16), out=nn.Linear(16, 16)), images(2, 5, 16)


def in_place_in_nested_sequentials():
    def forward(m, x):
        x = m.stem(x)
        y = m.block(x)
        y += x
        return m.head(F.relu(y, inplace=True))

    block = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
                          nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)))
    return Net(forward, stem=nn.Conv2d(3, 8, 3), block=block, head=nn.Conv2d(8, 4, 1)), images()


def two_inputs_and_outputs():
    def forward(m, x, y):
        z = torch.cat([F.relu(m.a(x)), F.relu(m.b(y))], 1)
        return m.c(z), m.d(z)

    return Net(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(1, 8, 3), c=nn.Conv2d(16, 4, 1),
               d=nn.Conv2d(16, 2, 1)), (images(), images(2, 1, 8, 8))


def dict_of_outputs():
    def forward(m, x):
        z = F.relu(m.a(x))
        return {"box": m.c(z), "class": m.d(z).sigmoid(), "features": z}

    return Net(forward, a=nn.Conv2d(3, 8, 3), c=nn.Conv2d(8, 4, 1), d=nn.Conv2d(8, 2, 1)), images()


def output_read_again():
    def forward(m, x):
        y = m.a(x)
        return y, m.b(F.relu(y)), x

    return Net(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 1)), images()


def concatenated_input():
    return Net(lambda m, x: m.b(torch.cat([x, m.a(x)], 1)), a=nn.Conv2d(3, 5, 3, padding=1),
               b=nn.Conv2d(8, 4, 1)), images()


def dead_channels():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2], net[2].weight[3] = 0, 0, 0
    return net, images()


def tiny_weights():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        net[0].weight.mul_(1e-8), net[0].bias.mul_(1e-8)
    return net, images() * 1e-3


def batch_of_one():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)), images(1, 3, 8, 8)


def without_a_batch():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), images(8)


def buffers_of_other_types():
    net = Net(lambda m, x: m.b((F.relu(m.a(x)) * m.wide.float())[:, m.order]), a=nn.Conv2d(3, 8, 3),
              b=nn.Conv2d(8, 4, 1))
    net.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 5, 4, 6]))
    net.register_buffer("wide", torch.rand(8, 1, 1, dtype=torch.float64))
    return net, images()


def norm_read_past():
    def forward(m, x):
        y = m.a(x)
        return m.b(F.relu(m.norm(y))) + m.c(y)

    return Net(forward, a=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8), b=nn.Conv2d(8, 4, 1),
               c=nn.Conv2d(8, 4, 1)), images()


def other_norms():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.InstanceNorm2d(8),
                         nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)), images()


def pools_of_signed_values():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), nn.AvgPool2d(2), nn.Conv2d(8, 4, 1),
                         nn.LeakyReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), images(2, 3, 16, 16)


def times_one():
    def forward(m, x):
        x = F.relu(m.a(x)) * 1.0
        return m.c(F.relu(m.b(x)) / 1 + 0)

    return Net(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 8, 3), c=nn.Conv2d(8, 4, 1)), images()


def decoder():
    def forward(m, x):
        a = F.relu(m.a(x))
        x = F.relu(m.c(torch.cat([a, m.up(F.relu(m.down(a)))], 1)))
        return m.out(F.interpolate(x, scale_factor=2, mode="bilinear"))

    return Net(forward, a=nn.Conv2d(3, 8, 3, padding=1), down=nn.Conv2d(8, 8, 3, 2, 1),
               up=nn.ConvTranspose2d(8, 8, 2, 2), c=nn.Conv2d(16, 8, 3, padding=1),
               out=nn.Conv2d(8, 2, 1)), images()


def weights_used_otherwise():
    return Net(lambda m, x: F.conv2d(F.relu(F.conv2d(x, m.a.weight * 2, m.a.bias)), m.b.weight, m.b.bias),
               a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 1)), images()


STRANGE = [tied_to_embedding, tied_linears, tied_without_bias, transformer, attention_by_hand,
           in_place_in_nested_sequentials, two_inputs_and_outputs, dict_of_outputs, output_read_again,
           concatenated_input, dead_channels, tiny_weights, batch_of_one, without_a_batch, buffers_of_other_types,
           norm_read_past, other_norms, pools_of_signed_values, times_one, decoder, weights_used_otherwise]
FLOAT = {"table": "no int8 Embedding", "block.self_attn": "no int8 MultiheadAttention", "up": "no int8 ConvTranspose2d",
         "block.self_attn.out_proj": "the whole attention", "a": "does not run it as a layer"}


@pytest.mark.parametrize("make", STRANGE, ids=lambda make: make.__name__)
def test_strange_models_deploy_exactly(make, tmp_path):
    pytest.importorskip("MNN")
    model, example = make()
    args = example if isinstance(example, tuple) else (example,)
    quantizer = LSQQuantizer(model, bits=8)
    quantizer.convert().train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        sum(output.pow(2).mean() for output in tensors_in(model(*args))).backward()
        optimizer.step()
    deployed = quantizer.deploy(tmp_path / "m", args, dynamo=make is times_one)  # the exporter that drops it
    assert deployed.sqnr_db >= 100 and deployed.coverage.fraction == 1.0
    for layer in quantizer.coverage().layers:
        if layer.state is LayerState.FLOAT:
            assert FLOAT[layer.name] in layer.reason
        else:
            assert make is not weights_used_otherwise or layer.name == "b"


@pytest.mark.parametrize("make", [LSQQuantizer, WeightQuantizer])
def test_groups_of_one_output_are_not_taken_for_depthwise(make, tmp_path):
    pytest.importorskip("MNN")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3, groups=2), nn.ReLU(), nn.Conv2d(2, 4, 1))
    quantizer = make(model)
    quantizer.convert().train()(images())
    deployed = quantizer.deploy(tmp_path / "m", images(), dynamo=False)
    assert deployed.sqnr_db >= 100 and deployed.coverage.share(LayerState.FLOAT) == 0


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
def test_weights_of_series_before_an_activation_are_stored(activation, tmp_path):
    """The converter crashed on entries without an output."""
    pytest.importorskip("MNN")
    quantizer = WeightQuantizer(nn.Sequential(nn.Conv1d(3, 4, 3), activation(), nn.Conv1d(4, 4, 1)))
    quantizer.convert()
    deployed = quantizer.deploy(tmp_path / "m", images(2, 3, 8), dynamo=False)
    assert deployed.sqnr_db >= 100 and deployed.coverage.share(LayerState.FLOAT) == 0


NORMS = {
    "L2": lambda y: F.normalize(y), "L1": lambda y: y.norm(1, dim=1), "log of a sum": lambda y: y.logsumexp(1),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dynamo", [True, False])
def test_norms_of_one_axis_are_read_as_they_are_meant(norm, dynamo, tmp_path):
    """From operator set 18 on the converter looks for their axes in the wrong place, and reduced all of them."""
    pytest.importorskip("MNN")
    quantizer = LSQQuantizer(Net(lambda m, x: NORMS[norm](m.a(x)), a=nn.Conv2d(3, 8, 3)))
    quantizer.convert().train()(images())
    assert quantizer.deploy(tmp_path / "m", images(), dynamo=dynamo).sqnr_db >= 100


# -- what is refused


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(value):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model[2].weight.data[0, 0] = value
    with pytest.raises(ValueError, match="1 of the 32 weights of layer '2' are not finite"):
        LSQQuantizer(model)


@pytest.mark.parametrize("what", ["weights", "bias", "input scale"])
def test_diverged_training_is_not_exported(what, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    quantizer = LSQQuantizer(model)
    quantizer.convert().train()(images())
    broken = {"weights": model[0].weight, "bias": model[0].bias, "input scale": quantizer.scales["0"].activation}[what]
    broken.data.flatten()[0] = float("nan")
    with pytest.raises(ValueError, match="layer '0' cannot be deployed, its %s.* not finite" % what):
        quantizer.export(tmp_path / "m", images())
    assert not list(tmp_path.iterdir())


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="nothing to quantize"):
        LSQQuantizer(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))


def test_a_second_quantizer_on_the_same_model_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    first = LSQQuantizer(model)
    first.convert()
    with pytest.raises(RuntimeError, match="layer '0' is quantized already"):
        LSQQuantizer(model, bits=4).convert()
    first.strip_qat_ops()
    LSQQuantizer(model, bits=4).convert()


def test_integers_beyond_32_bits_are_refused(tmp_path):
    pytest.importorskip("MNN")
    from slimtrain.proto import run_model

    model, x = tied_to_embedding()
    quantizer = LSQQuantizer(model)
    quantizer.convert().train()(x)
    deployed = quantizer.deploy(tmp_path / "m", x, dynamo=False)
    with pytest.raises(ValueError, match="do not fit MNN's 32 bits"):
        run_model(deployed.mnn, {"args": (x + 2 ** 40).numpy()})

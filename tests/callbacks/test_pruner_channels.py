"""Channel groups and physical removal on networks of every family: smaller models that compute the same."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimtrain.callbacks import TaylorFOChannelPruner, load_shrunk, save_channel_plan, shrink
from slimtrain.callbacks.channel_trace import trace_channels
from slimtrain.core import OVERALL, ChannelPlan
from zoo import ZOO, lived_in

NETS = dict(ZOO)


def pruned(make, shape, sparsity=0.5, **options):
    torch.manual_seed(0)
    model = lived_in(make())
    pruner = TaylorFOChannelPruner(model, sparsity, sensitivity_steps=1, **options)
    model.train()
    x = torch.randn(shape)
    model(x).square().mean().backward()
    pruner.do_pruning(None)
    return model, pruner, x


def weight_count(model):
    return sum(module.weight.numel() for module in model.modules()
               if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)))


def outputs(model, x):
    model.eval()
    with torch.no_grad():
        return model(x)


def relative(wanted, found):
    return float((wanted - found).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", NETS)
def test_the_smaller_model_computes_what_the_masked_one_does(name):
    make, shape = NETS[name][:2]
    model, pruner, x = pruned(make, shape, align_channels=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    smaller = pruner.shrink()
    assert relative(outputs(model, x), outputs(smaller, x)) < 1e-5
    assert weight_count(smaller) / weight_count(model) == pytest.approx(1 - pruner.sparsity)
    assert weight_count(smaller) < 0.65 * weight_count(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["ResNet-18-like", "MobileNetV2-like", "hard-swish and SE", "MLP"])
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_the_share_of_weights_is_what_was_asked_for(name, sparsity):
    make, shape = NETS[name][:2]
    _, pruner, _ = pruned(make, shape, sparsity, align_channels=1)
    assert pruner.sparsity == pytest.approx(sparsity, abs=0.03)


def test_layers_keep_a_multiple_of_the_alignment():
    make, shape = NETS["ResNet-18-like"][:2]
    _, pruner, _ = pruned(make, shape, align_channels=4)
    assert all(len(layer.rows) % 4 == 0 for name, layer in pruner.plan().layers.items() if name != "fc")


def test_a_shrunk_checkpoint_is_loaded_by_whoever_has_the_class(tmp_path):
    make, shape = NETS["MobileNetV2-like"][:2]
    _, pruner, x = pruned(make, shape)
    smaller = pruner.shrink()
    torch.save(smaller.state_dict(), tmp_path / "small.pt")
    save_channel_plan(tmp_path / "channels.json", pruner.plan())
    fresh = load_shrunk(make(), tmp_path / "channels.json", torch.load(tmp_path / "small.pt", weights_only=True))
    assert torch.equal(outputs(smaller, x), outputs(fresh, x))
    assert all(module.groups in (1, module.in_channels) for module in fresh.modules() if isinstance(module, nn.Conv2d))


def test_shrinking_in_place_keeps_objects_and_trains_on():
    make, shape = NETS["ResNet-18-like"][:2]
    model, pruner, x = pruned(make, shape)
    wanted, identities = outputs(model, x), [id(value) for value in model.parameters()]
    ratios = pruner.current_prune_ratios()
    assert pruner.shrink(in_place=True) is model
    assert relative(wanted, outputs(model, x)) < 1e-5
    assert [id(value) for value in model.parameters()] == identities
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    model(x).square().mean().backward()
    optimizer.step()
    pruner.do_pruning(None)
    assert pruner.current_prune_ratios() == ratios


class Sigmoids(nn.Module):
    """Activations that are not zero at zero."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 5)

    def forward(self, x):
        return self.c(torch.sigmoid(self.b(torch.sigmoid(self.a(x)))).mean([2, 3]))


class Concat(nn.Module):
    """Branches that are concatenated, flattened into a linear layer, and a normalization over all channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3), nn.Conv2d(3, 20, 3)
        self.c, self.norm = nn.Conv2d(32, 16, 1), nn.GroupNorm(4, 16)
        self.d, self.fc = nn.Conv2d(16, 16, 1), nn.Linear(16 * 16, 6)

    def forward(self, x):
        x = F.relu(self.c(torch.cat([self.a(x), F.leaky_relu(self.b(x))], 1)))
        return self.fc(torch.flatten(F.max_pool2d(self.d(self.norm(x)), 1), 1))


class Reused(nn.Module):
    """One convolution that is called twice, with a PReLU and a learned scale per channel."""

    def __init__(self):
        super().__init__()
        self.stem, self.again, self.act = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.PReLU(16)
        self.gain, self.last = nn.Parameter(torch.rand(1, 24, 1, 1)), nn.Conv2d(16, 24, 1)
        self.head = nn.Conv2d(24, 4, 1)

    def forward(self, x):
        x = self.act(self.again(self.act(self.again(self.stem(x)))))
        return self.head(self.last(x) * self.gain)


@pytest.mark.parametrize("make", [Sigmoids, Concat, Reused])
def test_structures_of_all_kinds_shrink_to_the_same_function(make):
    model, pruner, x = pruned(make, (2, 3, 6, 6), 0.5, align_channels=1)
    smaller = pruner.shrink()
    assert relative(outputs(model, x), outputs(smaller, x)) < 1e-5
    assert weight_count(smaller) < 0.62 * weight_count(model)


def test_channels_that_must_stay_are_listed_with_the_reason():
    _, pruner, _ = pruned(Concat, (2, 3, 6, 6))
    reasons = {row.name: row.reason for row in pruner.report()}
    assert "group_norm" in reasons["c"] and "leave the network" in reasons["fc"]
    assert reasons["a"] == reasons["b"] == reasons["d"] == ""
    assert "mul" in trace_channels(Reused(), (torch.randn(1, 3, 6, 6),), {}).fixed["last"]


class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.c(torch.cat([self.a(x)[:, :4], self.b(x).narrow(1, 2, 4)], 1))


def test_slices_at_fixed_positions_keep_their_channels():
    fixed = trace_channels(Cut(), (torch.randn(1, 3, 4, 4),), {}).fixed
    assert fixed["a"] == fixed["b"] == "its channels are cut at fixed positions"


def test_skipped_layers_keep_their_channels():
    make, shape = NETS["conv chain"][:2]
    _, pruner, _ = pruned(make, shape, 0.4, skip_layers=["conv2"], align_channels=1)
    assert len(pruner.plan().layers["conv2"].rows) == 16
    assert {row.name: row.reason for row in pruner.report()}["conv2"] == "named in skip_layers"


class Counted(nn.Module):
    """Its code knows a number of channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Linear(16 * 4, 4)

    def forward(self, x):
        return self.b(F.relu(self.a(x)).view(-1, 16 * 4))


def test_a_model_whose_code_depends_on_a_number_of_channels_is_left_whole():
    model, pruner, x = pruned(Counted, (2, 3, 2, 2))
    before = outputs(model, x)
    with pytest.raises(RuntimeError, match="depend"):
        pruner.shrink(in_place=True)
    assert torch.equal(outputs(model, x), before)


def test_a_plan_for_channels_that_are_not_zero_is_refused():
    make, shape = NETS["conv chain"][:2]
    _, pruner, x = pruned(make, shape)
    with pytest.raises(RuntimeError, match="not zero"):
        shrink(make(), pruner.plan(), example=((x,), {}))
    with pytest.raises(ValueError, match="another model"):
        shrink(Sigmoids(), pruner.plan())
    with pytest.raises(ValueError, match="another model"):
        shrink(make(), ChannelPlan({"conv1": pruner.plan().layers["conv2"]}, {}))


def test_given_shares_of_channels_hold(tmp_path):
    path = tmp_path / "ratios.yml"
    make, shape = NETS["conv chain"][:2]
    path.write_text("conv2.weight: 0.75\nconv3.weight: 0.0\n")
    _, pruner, _ = pruned(make, shape, 0.3, config_file=path, align_channels=1)
    layers = pruner.plan().layers
    assert len(layers["conv2"].rows) == 4 and len(layers["conv3"].rows) == 16
    found = pruner.found_ratios()
    assert found["conv2.weight"] == 0.75 and found[OVERALL] == pytest.approx(pruner.sparsity)


def test_the_structure_is_learned_from_the_first_batch_or_an_example():
    model = Sigmoids()
    pruner = TaylorFOChannelPruner(model, 0.5)
    with pytest.raises(RuntimeError, match="example_input"):
        pruner.classes  # noqa: B018
    assert TaylorFOChannelPruner(Sigmoids(), 0.5, example_input=torch.randn(2, 3, 6, 6)).classes.groups
    model(torch.randn(2, 3, 6, 6))
    assert not model._forward_pre_hooks and len(pruner.classes.groups) == 2


def test_tracing_leaves_the_model_as_it_is():
    model = lived_in(NETS["ResNet-18-like"][0]())
    model.train()
    before, state = {key: value.clone() for key, value in model.state_dict().items()}, torch.random.get_rng_state()
    trace_channels(model, (torch.randn(1, 3, 32, 32),), {})
    torch.random.set_rng_state(state)
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_kept_channels_are_those_with_the_highest_sensitivity():
    torch.manual_seed(0)
    model = Sigmoids()
    pruner = TaylorFOChannelPruner(model, 0.5, sensitivity_steps=1, align_channels=1)
    model(torch.randn(4, 3, 6, 6)).square().mean().backward()
    scores = (model.a.weight * model.a.weight.grad).detach().double().abs().sum([1, 2, 3]).numpy()
    pruner.do_pruning(None)
    rows = pruner.plan().layers["a"].rows
    assert sorted(np.argsort(scores)[-len(rows):].tolist()) == rows


@pytest.mark.parametrize("loud", range(4))
def test_the_scale_of_a_filter_before_a_norm_does_not_matter(loud):
    kept = []
    for scale in (1, 64):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3))
        with torch.no_grad():
            model[0].weight[loud] *= scale
        pruner = TaylorFOChannelPruner(model, 0.5, sensitivity_steps=1, align_channels=1)
        model(torch.randn(16, 3, 8, 8)).square().mean().backward()
        pruner.do_pruning(None)
        kept.append(pruner.plan().layers["0"].rows)
    assert kept[0] == kept[1]

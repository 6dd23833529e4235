"""Wherever a training forward goes, the tensors are quantized where the device quantizes them."""
from __future__ import annotations

import collections
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from handmade import IN, OUT, Hand, quantized
from nets import Small, images, loader, trainer
from slimtrain.callbacks import LSQQuantizer, LSQQuantizerCallback

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


class Base(nn.Module):
    """Four 1x1 convolutions and a hand-written twin of each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1) for _ in range(4))
        self.act = nn.ReLU()
        self.drop = nn.Dropout(0.5)

    def hand(self, h, x):
        raise NotImplementedError


class Functional(Base):
    def forward(self, x):
        return self.d(torch.relu(self.c(self.b(F.relu(self.a(x))).relu())))

    def hand(self, h, x):
        return h.plain("d", h.relu("c", h.relu("b", h.relu("a", h.q("a", IN, x)))))


class OneModuleTwice(Functional):
    def forward(self, x):
        return self.d(self.act(self.c(self.act(self.b(self.act(self.a(x)))))))


class InPlaceModules(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    forward = OneModuleTwice.forward


class ResultIgnored(Base):
    """In-place operations whose result is not used, on a tensor that is read twice."""

    def forward(self, x):
        x = self.a(x)
        F.relu(x, inplace=True)
        y = self.b(x)
        y.relu_()
        y.add_(x)
        return self.c(y) + y

    def hand(self, h, x):
        x = h.relu("a", h.q("a", IN, x))
        y = h.q("c", IN, h.relu("b", x) + x)
        return h.plain("c", y) + y


class ItemAssigned(Base):
    def forward(self, x):
        x = F.relu(self.a(x)).clone()
        x[:, 0] = x[:, 1] * 0.37
        return self.b(x)

    def hand(self, h, x):
        x = h.relu("a", h.q("a", IN, x)).clone()
        x[:, 0] = x[:, 1] * 0.37
        return h.plain("b", h.q("b", IN, x))


class Residual(Base):
    def forward(self, x):
        x = F.relu(self.a(x))
        y = self.b(x)
        y += x
        return self.c(F.relu(y))

    def hand(self, h, x):
        x = h.relu("a", h.q("a", IN, x))
        return h.plain("c", h.q("c", IN, F.relu(h.plain("b", x) + x)))


class Joined(Base):
    def forward(self, x):
        return self.c(torch.cat([F.relu(self.a(x[:, :, :3])), self.b(x[:, :, 3:])], 2))

    def hand(self, h, x):
        x = h.q("a", IN, x)  # what is joined shares the scale of the first
        return h.plain("c", torch.cat([h.relu("a", x[:, :, :3]), h.q("a", OUT, h.run("b", x[:, :, 3:]))], 2))


class Gate(Base):
    """Squeeze and excitation."""

    def forward(self, x):
        x = F.relu(self.a(x))
        gate = torch.sigmoid(self.c(F.relu(self.b(x.mean([2, 3], keepdim=True)))))
        return self.d(x * gate)

    def hand(self, h, x):
        x = h.relu("a", h.q("a", IN, x))
        gate = torch.sigmoid(h.plain("c", h.relu("b", h.q("b", IN, x.mean([2, 3], keepdim=True)))))
        return h.plain("d", h.q("d", IN, x * gate))


class Shuffle(Base):
    def forward(self, x):
        x = F.relu(self.a(x))
        x = x.view(2, 2, 2, 6, 6).transpose(1, 2).reshape(2, 4, 6, 6)
        left, right = x.chunk(2, dim=3)
        return self.b(right) + F.channel_shuffle(left, 2)

    def hand(self, h, x):
        x = h.relu("a", h.q("a", IN, x)).view(2, 2, 2, 6, 6).transpose(1, 2).reshape(2, 4, 6, 6)
        left, right = x.chunk(2, dim=3)
        return h.plain("b", right) + F.channel_shuffle(left, 2)


class Pooled(Base):
    def forward(self, x):
        return self.b(F.max_pool2d(F.relu(self.a(x)), 2))

    def hand(self, h, x):
        return h.plain("b", F.max_pool2d(h.relu("a", h.q("a", IN, x)), 2))


class Shared(Base):
    """One layer used on two tensors."""

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.b(self.a(x)) + self.b(x)

    def hand(self, h, x):
        x = h.relu("a", h.q("a", IN, x))
        return h.plain("b", h.plain("a", x)) + h.plain("b", x)


class Recursive(Base):
    def forward(self, x, depth=2):
        if depth == 0:
            return self.b(x)
        return self(F.relu(self.a(x)), depth - 1)

    def hand(self, h, x):
        return h.plain("b", h.relu("a", h.relu("a", h.q("a", IN, x))))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, 1)

    def forward(self, x, *, scaled, rest):
        return self.a(x) + scaled * 2 + rest["more"][0]


class Containers(Base):
    """Tensors that travel by keyword, in lists and in dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        y = F.relu(self.a(x))
        holder = collections.defaultdict(list, {"more": [y]})
        return self.b(self.inner(y, scaled=x, rest=holder))

    def hand(self, h, x):
        x = h.q("a", IN, x)
        y = h.relu("a", x)
        return h.plain("b", h.q("b", IN, h.plain("inner.a", y) + x * 2 + y))


class TwoRoutes(Base):
    """A tensor that one reader takes before the activation: nothing may be fused."""

    def forward(self, x):
        y = self.a(x)
        return self.b(F.relu(y)) + y

    def hand(self, h, x):
        y = h.plain("a", h.q("a", IN, x))
        return h.plain("b", h.q("b", IN, F.relu(y))) + y


MODELS = [Functional, OneModuleTwice, InPlaceModules, ResultIgnored, ItemAssigned, Residual, Joined, Gate, Shuffle,
          Pooled, Shared, Recursive, Containers, TwoRoutes]


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_training_computes_what_the_hand_computes(kind):
    model = kind()
    quantizer = quantized(model, X)
    assert not quantizer.unused_layers() or kind not in (Functional, Gate)
    wanted = model.hand(Hand(quantizer), X)
    assert torch.equal(model(X), wanted)
    assert torch.equal(model(X), wanted)  # a second run gives the same names


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_evaluation_computes_the_same_to_one_level(kind):
    model = kind()
    quantizer = quantized(model, X, bits=8)
    wanted = model.hand(Hand(quantizer), X)
    model.eval()
    found = model(X)
    assert (found - wanted).abs().mean() <= 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_it_is_what_the_device_computes(kind, tmp_path):
    pytest.importorskip("MNN")
    quantizer = quantized(kind(), X, bits=8)
    deployed = quantizer.deploy(tmp_path / "m", X, dynamo=kind is Shuffle)  # which the other exporter lacks
    assert deployed.sqnr_db >= 100
    assert deployed.coverage.fraction == 1.0


def test_dropout_acts_on_the_grid():
    class Dropped(Base):
        def forward(self, x):
            return self.b(self.drop(F.relu(self.a(x))))

    model = Dropped()
    h = Hand(quantized(model, X))
    torch.manual_seed(3)
    found = model(X)
    torch.manual_seed(3)
    wanted = h.plain("b", h.q("a", OUT, model.drop(h.relu("a", h.q("a", IN, X)))))
    kept = wanted == found
    assert kept.float().mean() > 0.5  # dropout doubles values: some leave the grid's range


def test_first_training_batch_sets_the_scales_and_the_model_stays():
    model = Functional()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    quantizer = LSQQuantizer(model, bits=4)
    assert quantizer.convert() is model
    random = torch.get_rng_state()
    model(X)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model(X), model.hand(Hand(quantizer), X))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    now = list(model.parameters())
    assert all(any(new is old for new in now) for old in parameters)
    assert {id(p) for p in now} - {id(p) for p in parameters} == {id(p) for p in quantizer.scale_parameters()}
    model.load_state_dict(before)  # strict: no key of ours is missed


def test_batch_norm_statistics_of_calibration_are_undone():
    model = Small()
    before = {name: value.clone() for name, value in model.named_buffers()}
    LSQQuantizer(model).calibrate([images(4)[0]])
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers() if name in before)


# -- branches


class Branches(Base):
    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.relu(self.b(x)) if x.mean() > 0.2 else torch.tanh(self.c(x))
        return self.d(x)


def test_unrecorded_branch_is_quantized_around_its_layers(caplog):
    model = Branches()
    quantizer = quantized(model, X + 3 * (model.a(X).mean() > 0))
    recorded = "b" if "c" in quantizer.unused_layers() else "c"
    small, large = X * 1e-3, X * 50
    outputs = {}
    h = Hand(quantizer)
    for x in (small, large):
        with torch.no_grad():
            outputs[bool(h.relu("a", h.q("a", IN, x)).mean() > 0.2)] = (x, model(x))
    assert len(outputs) == 2, "the inputs must take both branches"
    for taken, (x, found) in outputs.items():
        x = h.relu("a", h.q("a", IN, x))
        if taken:
            x = h.relu("b", x) if recorded == "b" else F.relu(h.plain("b", x))
        else:
            x = torch.tanh(h.plain("c", x))
        on_d = found / quantizer.scales["d"].activation_scale(OUT).item()
        assert torch.allclose(on_d, on_d.round(), atol=1e-3)
        if taken is (recorded == "b"):
            known = x if recorded == "b" else h.q("d", IN, x)
            assert torch.equal(found, h.plain("d", known))
    other = "c" if recorded == "b" else "b"
    assert any(repr(other) in record.getMessage() for record in caplog.records)


# -- what a run leaves behind


class Broken(Base):
    def __init__(self, error) -> None:
        super().__init__()
        self.error = error
        self.inner = Inner()

    def forward(self, x):
        x = F.relu(self.a(x))
        if self.error is not None:
            self.inner.a(x)
            raise self.error
        return self.b(x)


@pytest.mark.parametrize("error", [ValueError("user"), KeyboardInterrupt(), GeneratorExit()],
                         ids=lambda error: type(error).__name__)
def test_nothing_stays_after_an_exception(error):
    model = Broken(None)
    quantizer = quantized(model, X)
    wanted = model(X)
    model.error = error
    for _ in range(2):
        with pytest.raises(type(error)):
            model(X)
    model.error = None
    assert torch.equal(model(X), wanted)
    assert not _get_current_function_mode_stack()
    quantizer.strip_qat_ops()
    assert torch.equal(model(X), model.b(F.relu(model.a(X))))


def test_nothing_of_ours_on_tensors(tmp_path):
    model = Small()
    x = images(4)[0]
    quantized(model, x)
    out = model(x)
    assert not vars(out) and not vars(x) and not any(vars(p) for p in model.parameters())
    torch.save(out.detach(), tmp_path / "out.pt")
    torch.load(tmp_path / "out.pt", weights_only=True)


def test_intermediate_tensors_are_not_kept_alive():
    import gc
    import weakref

    class Watched(Functional):
        def forward(self, x):
            y = self.a(x)
            self.seen = weakref.ref(y)
            return self.d(F.relu(y))

    model = Watched()
    quantized(model, X)
    with torch.no_grad():
        model(X)
    gc.collect()
    assert model.seen() is None


def test_two_quantized_models_in_one_step():
    first, second = Functional(), Residual()
    one, two = quantized(first, X, seed=1), quantized(second, X, seed=2)
    wanted = second.hand(Hand(two), first.hand(Hand(one), X))
    assert torch.equal(second(first(X)), wanted)


def test_strip_and_resume():
    model = Functional()
    quantizer = quantized(model, X)
    simulated = model(X)
    quantizer.strip_qat_ops()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert len(list(model.parameters())) == 8
    assert torch.equal(model(X), model.d(F.relu(model.c(F.relu(model.b(F.relu(model.a(X))))))))
    quantizer.strip_qat_ops()
    for _ in range(2):
        quantizer.resume_qat_graph()
    assert torch.equal(model(X), simulated)


def test_deep_copy_is_a_second_quantized_model():
    model = Gate()
    quantized(model, X)
    twin = copy.deepcopy(model)
    wanted = model(X)
    assert torch.equal(twin(X), wanted)
    mine = {id(p) for p in model.parameters()}
    assert not any(id(p) in mine for p in twin.parameters())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.7)
    assert not torch.equal(twin(X), wanted)
    assert torch.equal(model(X), wanted)


# -- activation checkpointing


class Checkpointed(nn.Module):
    def __init__(self, how) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.last = nn.Conv2d(4, 4, 1)
        self.how = how

    def forward(self, x):
        return self.last(F.relu(self.how(self, F.relu(self.first(x)))))


def _gradients(how):
    torch.manual_seed(0)
    model = Checkpointed(how)
    quantizer = LSQQuantizer(model, bits=4)
    quantizer.convert()
    model(X)
    for _ in range(2):
        model(X).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_module_has_the_same_gradients(reentrant):
    wanted = _gradients(lambda model, x: model.block(x))
    found = _gradients(lambda model, x: checkpoint(model.block, x, use_reentrant=reentrant))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", [
    lambda model, x, **options: checkpoint(lambda y: F.relu(model.block(y)), x, **options),
    lambda model, x, **options: checkpoint(model.block[0], x, **options),
    lambda model, x, **options: checkpoint_sequential(model.block, 2, x, **options),
], ids=["function", "layer", "sequential"])
def test_what_checkpoint_hides_is_refused(how, reentrant):
    with pytest.raises(RuntimeError, match="torch.utils.checkpoint"):
        _gradients(lambda model, x: how(model, x, use_reentrant=reentrant))


def test_checkpointed_whole_model():
    class Whole(Functional):
        pass

    model = Whole()
    quantized(model, X)
    model(X).square().sum().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    checkpoint(model, X, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(parameter.grad, wanted[name]) for name, parameter in model.named_parameters())


# -- training steps


def _lightning(step):
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.net, self.head = nn.Conv2d(1, 4, 1), Residual(), nn.Linear(4, 4)
            self.outputs = []

        def forward(self, x):
            return self.head(F.relu(self.net(F.relu(self.stem(x / 2)))).mean([2, 3]))

        def helper(self, x):
            return F.relu(self.net(F.relu(self.stem(x))))

        def training_step(self, batch, batch_idx):
            out = step(self, batch[0])
            self.outputs.append(out.detach().clone())
            return F.cross_entropy(out, batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    return Module()


STEPS = {
    "self": lambda m, x: m(x),
    "parts": lambda m, x: m.head(F.relu(m.net(F.relu(m.stem(x / 2)))).mean([2, 3])),
    "helper": lambda m, x: m.head(m.helper(x / 2).mean([2, 3])),
    "forward": lambda m, x: m.forward(x),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_lightning_step_computes_what_the_hand_computes(step, tmp_path):
    model = _lightning(step)
    callback = LSQQuantizerCallback(bits=4, export_to="")
    trainer(tmp_path, callback, max_epochs=1).fit(model, loader(count=8))
    h = Hand(callback.quantizer)
    x = h.relu("stem", h.q("stem", IN, images(8)[0] / 2))
    y = h.relu("net.a", x)
    y = h.q("net.c", IN, F.relu(h.plain("net.b", y) + y))
    wanted = h.plain("head", h.q("head", IN, h.relu("net.c", y).mean([2, 3])))
    assert torch.equal(model.outputs[-1], wanted)
    assert not _get_current_function_mode_stack()


def test_submodule_is_quantized_alone(tmp_path):
    model = _lightning(STEPS["parts"])
    callback = LSQQuantizerCallback(bits=4, export_to="", module="net")
    trainer(tmp_path, callback, max_epochs=1).fit(model, loader(count=8))
    h = Hand(callback.quantizer)
    x = F.relu(model.stem(images(8)[0] / 2))
    wanted = model.head(F.relu(model.net.hand(h, x)).mean([2, 3]))
    assert torch.equal(model.outputs[-1], wanted.detach())

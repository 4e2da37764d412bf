"""The step against references, with the toy family and hooks of the tests' own."""

from __future__ import annotations

import pytest
import torch
from hooktuner import Conditioning, Regularizer, hookimpl
from hooktuner.errors import NonFiniteLossError, PluginError
from hooktuner.testing import ToyFamily, load_denoiser, make_batch, make_plugins, make_run
from hooktuner.train.adapters import collect_trainables, prepare_trainables
from hooktuner.train.blocks import BlockRunner, Recompute
from hooktuner.train.engine import Engine
from hooktuner.train.kernel import Kernel
from hooktuner.train.optim import make_optimizer
from torch import nn

CAPTIONS = ("a red square", "a longer caption about a green circle", "blue")


def make_kernel(folder, *techniques, **config):
    plugins = make_plugins(ToyFamily, *techniques)
    run = make_run(plugins, None, folder, max_train_steps=10, **config)
    denoiser = load_denoiser(run, plugins)
    prepare_trainables(run, denoiser)
    regularizers = plugins.regularizer(run, denoiser)
    trainables = collect_trainables(denoiser, regularizers)
    runner = BlockRunner(denoiser, run.anatomy, [], Recompute(enabled=run.config.gradient_checkpointing))
    runner.attach()
    optimizer = make_optimizer(run.config, trainables)
    engine = Engine(run.config)
    return Kernel(run, plugins, engine, denoiser, runner, regularizers, trainables, optimizer)


def batch_of(kernel, captions=CAPTIONS, first_index=0):
    return make_batch(kernel.run, kernel.plugins, captions=captions, first_index=first_index)


def weights(kernel):
    return {name: value.detach().clone() for name, value in kernel.trainables.named().items()}


def one_step(kernel, *batches, number=1, lr=1e-3):
    samples = sum(len(batch.index) for batch in batches)
    return kernel.step(number, 0, lr, list(enumerate(batches)), samples)


def test_the_loss_is_the_mean_squared_velocity_error_of_the_prediction(tmp_path):
    kernel = make_kernel(tmp_path)
    batch = batch_of(kernel)
    step = kernel.draw(batch, 1, 0)
    x0, noise = batch.latents_BCFHW.double(), batch.noise_BCFHW.double()
    sigma = batch.sigma_B.double().view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(step.noisy_BCFHW.double(), (1 - sigma) * x0 + sigma * noise, rtol=1e-6, atol=1e-6)
    step.prediction_BCFHW = kernel.predict(step)
    expected = (step.prediction_BCFHW.double() - (noise - x0)).square().mean()
    assert kernel.losses(step)["flow"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert one_step(kernel, batch).wait().loss == pytest.approx(expected.item(), rel=1e-6)


def test_every_sample_weighs_the_same_however_it_is_batched(tmp_path):
    gradients = []
    for split in ([(0, 3)], [(0, 1), (1, 3)], [(0, 1), (1, 2), (2, 3)]):
        kernel = make_kernel(tmp_path, max_grad_norm=0.0)
        kernel.optimizer.zero_grad = lambda set_to_none=True: None
        batches = [batch_of(kernel, CAPTIONS[begin:end], begin) for begin, end in split]
        for batch, (begin, end) in zip(batches, split, strict=True):
            batch.sigma_B = torch.tensor([0.25, 0.5, 0.75])[begin:end]
        result = one_step(kernel, *batches).wait()
        gradients.append((result.loss, [value.grad for value in kernel.trainables.named().values()]))
    for loss, grads in gradients[1:]:
        assert loss == pytest.approx(gradients[0][0], rel=1e-5)
        for one, other in zip(grads, gradients[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


class GivesFirstFrame(ToyFamily):
    name = "toy"

    @hookimpl
    def condition(self, run, step):
        given = torch.zeros_like(step.noisy_BCFHW[:, :1], dtype=torch.bool)
        given[:, :, 0] = True
        return Conditioning(given, torch.full_like(step.noisy_BCFHW, 7.0))


class Replaces:
    name = "replaces"
    answer = None

    @hookimpl
    def prepare_input(self, run, step, predict):
        velocity = predict(step.noisy_BCFHW, step.sigma_B)
        assert not velocity.requires_grad
        return self.answer(step)


def test_given_latents_replace_noise_and_leave_the_loss_also_after_prepare_input(tmp_path):
    replaces = Replaces()
    replaces.answer = lambda step: {"noisy_BCFHW": torch.zeros_like(step.noisy_BCFHW), "sigma_B": step.sigma_B / 2}
    plugins = make_plugins(GivesFirstFrame, replaces)
    run = make_run(plugins, None, tmp_path, max_train_steps=1)
    denoiser = load_denoiser(run, plugins)
    prepare_trainables(run, denoiser)
    trainables = collect_trainables(denoiser, {})
    runner = BlockRunner(denoiser, run.anatomy, [], Recompute())
    engine = Engine(run.config)
    kernel = Kernel(run, plugins, engine, denoiser, runner, {}, trainables, make_optimizer(run.config, trainables))
    batch = batch_of(kernel)
    step = kernel.draw(batch, 1, 0)
    assert (step.noisy_BCFHW[:, :, 0] == 7).all()
    assert (step.noisy_BCFHW[:, :, 1:] == 0).all()
    assert torch.equal(step.timestep_B, 1000 * batch.sigma_B / 2)
    step.prediction_BCFHW = step.target_BCFHW.clone()
    step.prediction_BCFHW[:, :, 0] += 100  # an error where latents are given does not count
    assert kernel.losses(step)["flow"].item() == 0


@pytest.mark.parametrize(
    "answer",
    [lambda step: {"noisy_BCFHW": step.noisy_BCFHW[:1]}, lambda step: {"latents": step.noisy_BCFHW}],
)
def test_a_wrong_answer_of_prepare_input_names_the_plugin(tmp_path, answer):
    replaces = Replaces()
    replaces.answer = answer
    kernel = make_kernel(tmp_path, replaces)
    with pytest.raises(PluginError, match="replaces — hook prepare_input answered"):
        kernel.draw(batch_of(kernel), 1, 0)


class Breaks:
    """A loss that is not finite from a given step on."""

    name = "breaks"

    def __init__(self, at, value=float("nan")):
        self.at, self.value = at, value

    @hookimpl
    def compute_loss(self, run, step):
        loss_B = (step.prediction_BCFHW - step.target_BCFHW).square().flatten(1).mean(1)
        return loss_B * self.value if step.number == self.at else loss_B


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves_and_names_step_and_samples(tmp_path, value):
    kernel = make_kernel(tmp_path, Breaks(at=2, value=value))
    one_step(kernel, batch_of(kernel)).wait()
    before = weights(kernel)
    pending = one_step(kernel, batch_of(kernel), number=2)
    one_step(kernel, batch_of(kernel), number=3)  # a step enqueued before the numbers of step 2 have arrived
    with pytest.raises(NonFiniteLossError, match=r"step 2 — loss/flow = (nan|inf); .*test/clip-0, test/clip-1"):
        pending.wait()
    assert all(torch.equal(value, before[name]) for name, value in kernel.trainables.named().items())


class Pulls:
    """A regularizer with a module and a state."""

    name = "pulls"

    def __init__(self, weight=0.5):
        self.weight = weight
        self.head = nn.Linear(1, 1, bias=False)

    @hookimpl
    def regularizer(self, run, model):
        return self.Terms(self)

    class Terms(Regularizer):
        def __init__(self, owner):
            self.owner = owner

        def terms(self, step):
            value = self.owner.head(step.prediction_BCFHW.mean().reshape(1, 1)).square().sum()
            return {"": self.owner.weight * value, "size": 0.25 * step.prediction_BCFHW.square().mean()}

        def modules(self):
            return {"head": self.owner.head}


def test_regularizer_terms_join_the_loss_under_their_owners_name_and_their_modules_train(tmp_path):
    torch.manual_seed(0)
    pulls = Pulls()
    kernel = make_kernel(tmp_path, pulls)
    before = weights(kernel)
    result = one_step(kernel, batch_of(kernel)).wait()
    assert set(result.terms) == {"flow", "pulls", "pulls/size"}
    assert result.loss == pytest.approx(sum(result.terms.values()))
    assert list(kernel.trainables.groups) == ["denoiser", "pulls"]
    moved = [name for name, value in kernel.trainables.named().items() if not torch.equal(value, before[name])]
    assert "regularizer.pulls.head.weight" in moved


def test_a_regularizer_of_weight_zero_changes_no_bit_of_the_denoisers_weights(tmp_path):
    class Zero(Pulls.Terms):
        def terms(self, step):
            return {"": 0.0 * step.prediction_BCFHW.square().mean()}

        def modules(self):
            return {}

    class ZeroPlugin:
        name = "zero"

        @hookimpl
        def regularizer(self, run, model):
            return Zero(None)

    found = []
    for techniques in ((), (ZeroPlugin,)):
        kernel = make_kernel(tmp_path, *techniques)
        for number in (1, 2, 3):
            one_step(kernel, batch_of(kernel), number=number)
        found.append(weights(kernel))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_clipping_by_norm_and_by_value(tmp_path):
    for method, limit in (("norm", 1e-3), ("value", 1e-5)):
        kernel = make_kernel(tmp_path, grad_clip_method=method, max_grad_norm=limit)
        kernel.optimizer.zero_grad = lambda set_to_none=True: None
        norm = one_step(kernel, batch_of(kernel)).wait().grad_norm
        gradients = torch.cat([value.grad.flatten() for value in kernel.trainables.named().values()])
        assert norm > limit  # what is reported is the norm before clipping
        if method == "norm":
            assert gradients.norm().item() == pytest.approx(limit, rel=1e-3)
        else:
            assert gradients.abs().max().item() <= limit


def test_dropout_is_a_function_of_the_micro_batch_and_not_of_torchs_global_stream(tmp_path):
    losses = []
    for disturb in (False, True):
        kernel = make_kernel(tmp_path, lora_dropout=0.5)
        with torch.no_grad():
            for name, value in kernel.trainables.named().items():
                if "lora_B" in name:
                    value.fill_(0.1)
        if disturb:
            torch.rand(17)
        losses.append([one_step(kernel, batch_of(kernel), number=number).wait().loss for number in (1, 2)])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]

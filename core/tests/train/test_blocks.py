"""The block runner on a small model with the diffusers calling convention."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hooktuner.technique import BlockCall, BlockInterceptor
from hooktuner.train.blocks import BlockRunner, Recompute
from torch import nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x, scale):
        self.calls += 1
        return x + torch.tanh(self.linear(x)) * scale


class Model(nn.Module):
    """Calls its blocks as diffusers models do."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.gradient_checkpointing = False

    def enable_gradient_checkpointing(self, func):
        self._gradient_checkpointing_func, self.gradient_checkpointing = func, True

    def disable_gradient_checkpointing(self):
        self.gradient_checkpointing = False

    def forward(self, x, scale):
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, scale)
            else:
                x = block(x, scale)
        return x


ANATOMY = SimpleNamespace(blocks=lambda model: list(model.blocks), extra_blocks=lambda model: [])
STEP = SimpleNamespace()


class Recorder(BlockInterceptor):
    def __init__(self, name, stage, log):
        self.name, self.stage, self.log = name, stage, log

    def begin(self, step):
        self.log.append(f"{self.name} begins")

    def end(self, step):
        self.log.append(f"{self.name} ends")

    def call(self, call: BlockCall, proceed):
        self.log.append(f"{self.name} before {call.index}")
        answer = proceed(call)
        self.log.append(f"{self.name} after {call.index}")
        return answer


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def gradients(model, runner):
    model.zero_grad()
    x, scale = torch.linspace(-1, 1, 16).reshape(2, 8).requires_grad_(), torch.tensor(0.5)
    runner.attach()
    with runner.during(STEP):
        out = model(x, scale)
        out.square().sum().backward()
    runner.detach()
    return [out.detach(), x.grad, *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("recompute", [Recompute(), Recompute(interval=2), Recompute(dropout=True)])
@pytest.mark.parametrize("stages", [(), ("observe",), ("route", "observe", "reside")])
def test_outputs_and_gradients_are_bit_equal_whatever_is_recomputed_or_intercepted(model, recompute, stages):
    plain = gradients(model, BlockRunner(model, None, [], Recompute(enabled=False)))
    interceptors = [Recorder(stage, stage, []) for stage in stages]
    found = gradients(model, BlockRunner(model, ANATOMY, interceptors, recompute))
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))


@pytest.mark.parametrize(("interval", "calls"), [(1, [2, 2, 2]), (2, [2, 1, 2]), (3, [2, 1, 1])])
def test_every_nth_block_is_computed_twice(model, interval, calls):
    gradients(model, BlockRunner(model, ANATOMY, [], Recompute(interval=interval)))
    assert [block.calls for block in model.blocks] == calls


def test_what_observes_runs_once_and_what_resides_runs_again_in_the_recomputation(model):
    log: list[str] = []
    route, observe, reside = (Recorder(stage, stage, log) for stage in ("route", "observe", "reside"))
    gradients(model, BlockRunner(model, ANATOMY, [route, observe, reside], Recompute()))
    assert log[:9] == [
        "route begins", "observe begins", "reside begins",
        "route before 0", "observe before 0", "reside before 0", "reside after 0", "observe after 0", "route after 0",
    ]  # fmt: skip
    assert log.count("route before 1") == log.count("observe before 1") == 1
    assert log.count("reside before 1") == 2
    assert log[-3:] == ["reside ends", "observe ends", "route ends"]


def test_interceptors_are_told_the_end_after_an_exception_and_only_if_they_began(model):
    log: list[str] = []
    first, second = Recorder("first", "observe", log), Recorder("second", "observe", log)
    second.begin = lambda step: (_ for _ in ()).throw(RuntimeError("no"))
    runner = BlockRunner(model, ANATOMY, [first, second], Recompute())
    with pytest.raises(RuntimeError, match="no"), runner.during(STEP):
        pass
    assert log == ["first begins", "first ends"]


def test_nothing_is_intercepted_without_gradients_or_outside_a_step(model):
    log: list[str] = []
    runner = BlockRunner(model, ANATOMY, [Recorder("one", "observe", log)], Recompute())
    runner.attach()
    x, scale = torch.ones(1, 8), torch.tensor(1.0)
    with torch.no_grad(), runner.during(STEP):
        model(x, scale)
    assert log == ["one begins", "one ends"]
    model(x, scale).sum().backward()
    assert log == ["one begins", "one ends"]
    runner.detach()


def test_an_interceptor_may_change_arguments_and_results(model):
    class Skip(BlockInterceptor):
        stage = "route"

        def call(self, call, proceed):
            return call.args[0] if call.index == 1 else proceed(call)

    runner = BlockRunner(model, ANATOMY, [Skip()], Recompute())
    gradients_or_none = None
    runner.attach()
    x, scale = torch.ones(1, 8), torch.tensor(1.0)
    with runner.during(STEP):
        out = model(x, scale)
        out.sum().backward()
    gradients_or_none = model.blocks[1].linear.weight.grad
    with torch.no_grad():
        expected = model.blocks[2](model.blocks[0](x, scale), scale)
    assert torch.equal(out.detach(), expected)
    assert gradients_or_none is None

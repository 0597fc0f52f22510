"""The engine: compiled steps are the eager ones to rounding, and who decides when they run.

Most tests run the traced graph itself in place of what torch's compiler makes of it: they are
about the tracing, the noise and the decisions. A few go through the compiler.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ebm_dist import energies
from ebm_dist.samplers import FAMILY, Engine, run_chain
from ebm_dist.samplers.compile import compiler
from ebm_dist.samplers.compile import engine as engine_module
from ebm_dist.samplers.compile.block import fitting
from ebm_dist.samplers.frozen import prepared_weights
from ebm_dist.samplers.stepper import make_stepper

needs_compiler = pytest.mark.skipif(
    compiler.missing() is not None, reason=f"cannot compile: {compiler.missing()}"
)

DISCRETE = ["gibbs", "gibbs_with_gradients", "discrete_langevin"]


STEPS_AND_END = 2
"""Graphs of a block of Langevin steps: the steps, and the energy where they end."""


def make(name: str, **params: Any) -> Any:
    return FAMILY.make(name, **{**FAMILY.members[name].example, **params})  # type: ignore[attr-defined]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def squares(x: Tensor) -> Tensor:
    return x.double().square().sum(1)


def mlp(**params: Any) -> energies.Energy:
    return energies.make("mlp", event_shape=(2,), widths=(16, 16), **params).eval()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The traced graphs, run as they are instead of being compiled."""
    seen: list[Any] = []

    def keep(graph: Any, inputs: list[Tensor]) -> Any:
        seen.append(graph)
        return lambda tensors: graph(*tensors)

    monkeypatch.setattr(engine_module, "compile_graph", keep)
    return seen


def same_chain(a: Any, b: Any, *, exact_positions: bool = False) -> None:
    if exact_positions:
        assert torch.equal(a.position, b.position)
    torch.testing.assert_close(a.position, b.position, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.energies, b.energies, rtol=1e-4, atol=1e-5)
    assert a.info.keys() == b.info.keys()
    for name in a.info:
        torch.testing.assert_close(a.info[name], b.info[name], rtol=1e-4, atol=1e-5)


# Chains and events: fewer numbers than 16, a multiple of 16 and neither, since torch fills
# each of them by another path.
SHAPES = {"langevin": (5, 2), "sghmc": (8, 2), "mala": (7, 3), "hmc": (3, 7), "random_walk": (5, 5)}


@pytest.mark.parametrize("name", SHAPES)
def test_blocks_draw_the_noise_that_single_steps_draw(graphs, name):
    num_chains, size = SHAPES[name]
    energy = energies.make("mlp", event_shape=(size,), widths=(8,)).eval()
    x = torch.randn(num_chains, size, generator=generator(1))
    kernel, alone, together = make(name), generator(2), generator(2)
    eager = run_chain(kernel, x, energy, 7, alone)
    engine = Engine("compiled", background=False)
    blocks = run_chain(kernel, x, energy, 7, together, engine=engine)
    assert len(graphs) == (STEPS_AND_END if name == "langevin" else 1)
    same_chain(eager, blocks)
    assert torch.equal(alone.get_state(), together.get_state())


@pytest.mark.parametrize("name", DISCRETE)
def test_blocks_of_discrete_kernels_make_the_same_decisions(graphs, name):
    targets = [
        energies.rbm(6, 3, weight_std=0.5),
        energies.ising((4, 4), 0.3),
        energies.make("potts", shape=(3, 3), num_values=3, coupling=0.4),
    ]
    for energy in targets:
        assert energy.event is not None
        x = energy.event.noise(12, generator(3))
        kernel = make(name)
        eager = run_chain(kernel, x, energy, 4, generator(4))
        engine = Engine("compiled", background=False)
        blocks = run_chain(kernel, x, energy, 4, generator(4), engine=engine)
        same_chain(eager, blocks, exact_positions=True)
    assert len(graphs) == len(targets)


def test_new_weights_reach_the_compiled_steps_without_a_compilation(graphs):
    energy, kernel, x = mlp(), make("langevin"), torch.randn(8, 2, generator=generator(1))
    engine = Engine("compiled", background=False)
    ends = []
    for scale in (1.0, 1.5, -0.8):
        with torch.no_grad():
            for p in energy.parameters():
                p.mul_(scale)
        blocks = run_chain(kernel, x, energy, 10, generator(2), engine=engine)
        same_chain(run_chain(kernel, x, energy, 10, generator(2)), blocks)
        ends.append(blocks.position)
    assert len(graphs) == STEPS_AND_END
    assert not torch.allclose(ends[0], ends[1], atol=1e-3)


def test_spectral_norm_is_taken_once_a_round_and_is_that_of_todays_weights(graphs):
    energy, kernel, x = mlp(spectral_norm=True), make("langevin"), torch.randn(8, 2)
    engine = Engine("compiled", background=False)
    for _ in range(2):
        plain, state = x, kernel.init(x, energy)
        noise = generator(2)
        for _ in range(10):
            state, _ = kernel.step(state, energy, noise)
        plain = state.position
        assert torch.equal(run_chain(kernel, x, energy, 10, generator(2)).position, plain)
        blocks = run_chain(kernel, x, energy, 10, generator(2), engine=engine)
        torch.testing.assert_close(blocks.position, plain, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for p in energy.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator(5)))
    assert len(graphs) == STEPS_AND_END
    assert not any("vecdot" in graph.code or "mv" in graph.code for graph in graphs)


def test_after_a_round_the_weights_are_the_very_tensors_they_were():
    energy = energies.make(
        "resnet", event_shape=(1, 8, 8), width=8, multipliers=(1,), spectral_norm=True
    ).eval()
    before = {name: (p, p.data_ptr(), p.stride()) for name, p in energy.named_parameters()}
    values = {name: t.clone() for name, t in energy.state_dict().items()}
    x = torch.rand(2, 1, 8, 8, generator=generator())
    expected = energy(x)

    def fails_half_way() -> None:
        with prepared_weights(energy, bf16=True, channels_last=True):
            assert any(b.dtype == torch.bfloat16 for b in energy.buffers())
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fails_half_way()
    after = {name: (p, p.data_ptr(), p.stride()) for name, p in energy.named_parameters()}
    assert {n: v[1:] for n, v in before.items()} == {n: v[1:] for n, v in after.items()}
    assert all(before[name][0] is after[name][0] for name in before)
    assert all(torch.equal(values[name], t) for name, t in energy.state_dict().items())
    assert torch.equal(energy(x), expected)


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_weights_cast_once_a_round_give_autocasts_own_numbers(spectral_norm):
    energy = energies.make(
        "resnet", event_shape=(1, 8, 8), width=8, multipliers=(1, 2), spectral_norm=spectral_norm
    ).eval()
    x = torch.rand(4, 1, 8, 8, generator=generator())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        each_time = energy(x)
        with prepared_weights(energy, bf16=True, channels_last=False):
            once = energy(x)
    torch.testing.assert_close(once, each_time, rtol=1e-5, atol=1e-5)


class Reads(nn.Module):
    """An energy that reads a tensor which is no parameter and no buffer of it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [torch.ones(2)]

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.hidden[0]).square().sum(1)


class Branches(nn.Module):
    """An energy whose formula depends on the numbers it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square().sum(1) if x.sum() > 0 else x.abs().sum(1)


class Drops(nn.Module):
    """An energy with noise of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5).square().sum(1)


@pytest.mark.parametrize(
    ("energy", "kernel", "why"),
    [
        (Reads(), "langevin", "cannot trace it"),
        (Branches(), "langevin", "cannot trace it"),
        (Drops(), "langevin", "noise of its own"),
        (mlp(), "parallel_tempering", "counts the moves"),
    ],
)
def test_steps_that_cannot_be_compiled_stay_eager_and_say_why_once(graphs, energy, kernel, why):
    said: list[str] = []
    engine = Engine("compiled", background=False, say=said.append)
    x = torch.randn(6, 2, generator=generator(1))
    for _ in range(2):
        torch.default_generator.manual_seed(0)
        chain = run_chain(make(kernel), x, energy, 6, generator(2), engine=engine)
        torch.default_generator.manual_seed(0)
        eager = run_chain(make(kernel), x, energy, 6, generator(2))
        if kernel == "langevin" and not isinstance(energy, Drops):
            assert torch.equal(chain.position, eager.position)
    assert len(said) == 1
    assert said[0].startswith("sampler.engine: eager, because ")
    assert why in said[0]
    assert graphs == []


def test_a_compiler_that_makes_other_steps_is_noticed_and_not_used(monkeypatch):
    def wrong(graph: Any, inputs: list[Tensor]) -> Any:
        return lambda tensors: [t + 0.1 for t in graph(*tensors)]

    monkeypatch.setattr(engine_module, "compile_graph", wrong)
    said: list[str] = []
    engine = Engine("compiled", background=False, say=said.append)
    x = torch.randn(6, 2, generator=generator(1))
    chain = run_chain(make("langevin"), x, mlp(), 6, generator(2), engine=engine)
    assert torch.equal(
        chain.position, run_chain(make("langevin"), x, mlp(), 6, generator(2)).position
    )
    assert "differ from the traced ones" in said[0]


def test_without_a_compiler_rounds_are_eager_and_a_steady_engine_refuses(monkeypatch):
    monkeypatch.setattr(compiler, "missing", lambda: "there is no C++ compiler (test)")
    said: list[str] = []
    x = torch.randn(6, 2, generator=generator(1))
    engine = Engine("compiled", background=False, say=said.append)
    chain = run_chain(make("langevin"), x, mlp(), 6, generator(2), engine=engine)
    eager = run_chain(make("langevin"), x, mlp(), 6, generator(2))
    assert torch.equal(chain.position, eager.position)
    assert said == ["sampler.engine: eager, because there is no C++ compiler (test)"]
    with pytest.raises(compiler.CompilerFailed, match=r"no C\+\+ compiler"):
        run_chain(
            make("langevin"), x, mlp(), 6, generator(2), engine=Engine("compiled", steady=True)
        )


def without_standalone_compile(monkeypatch: pytest.MonkeyPatch) -> str:
    import torch._inductor

    monkeypatch.setattr(compiler, "missing", lambda: None)
    monkeypatch.delattr(torch._inductor, "standalone_compile")
    return "standalone_compile"


def without_make_fx(monkeypatch: pytest.MonkeyPatch) -> str:
    from torch.fx.experimental import proxy_tensor

    monkeypatch.delattr(proxy_tensor, "make_fx")
    return "make_fx"


def without_memory(monkeypatch: pytest.MonkeyPatch) -> str:
    def build(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(engine_module, "build", build)
    return "CUDA out of memory. Tried to allocate 2 GiB"


@pytest.mark.parametrize("lacking", [without_standalone_compile, without_make_fx, without_memory])
def test_a_torch_with_other_insides_runs_single_steps_and_says_why(monkeypatch, lacking):
    what = lacking(monkeypatch)
    said: list[str] = []
    engine = Engine("compiled", background=False, say=said.append)
    x = torch.randn(6, 2, generator=generator(1))
    chain = run_chain(make("langevin"), x, mlp(), 6, generator(2), engine=engine)
    eager = run_chain(make("langevin"), x, mlp(), 6, generator(2))
    assert torch.equal(chain.position, eager.position)
    (line,) = said
    assert line.startswith("sampler.engine: eager, because ")
    assert what in line


def test_rounds_go_on_eagerly_while_the_compiler_works_and_then_change_over(monkeypatch):
    released, begun = threading.Event(), threading.Event()

    def slow(graph: Any, inputs: list[Tensor]) -> Any:
        begun.set()
        assert released.wait(60)
        return lambda tensors: [t.clone() for t in graph(*tensors)]

    monkeypatch.setattr(engine_module, "compile_graph", slow)
    said: list[str] = []
    engine = Engine("compiled", say=said.append)
    kernel, energy, x = make("langevin"), mlp(), torch.randn(6, 2, generator=generator(1))
    eager = run_chain(kernel, x, energy, 10, generator(2)).position
    for _ in range(3):
        now = run_chain(kernel, x, energy, 10, generator(2), engine=engine)
        assert torch.equal(now.position, eager)
    assert begun.wait(60)
    assert engine.compiling
    with torch.no_grad():
        for p in energy.parameters():  # weights that arrive while the old ones are traced
            p.mul_(2)
    released.set()
    (thread,) = [t for t in threading.enumerate() if t.name == "compile"]
    thread.join(60)
    assert not engine.compiling
    assert "runs blocks of 10 steps from now on, compiled in" in said[0]
    round_ = make_stepper(kernel, x.clone(), energy)
    assert engine.block(round_.kernel, energy, round_.state, 10) is not None
    same_chain(
        run_chain(kernel, x, energy, 10, generator(2)),
        run_chain(kernel, x, energy, 10, generator(2), engine=engine),
    )


def test_a_compiled_round_that_starts_where_the_energy_is_not_finite_says_so(graphs):
    kernel, energy, x = make("langevin"), mlp(), torch.zeros(6, 2)
    engine = Engine("compiled", background=False)
    run_chain(kernel, x, energy, 10, generator(), engine=engine)
    assert len(graphs) == STEPS_AND_END  # the next round is not looked at step by step
    x[4] = torch.nan
    with pytest.raises(ValueError, match=r"1 of 6 .*at the start of the chains \(x\) \(chains 4\)"):
        run_chain(kernel, x, energy, 10, generator(), engine=engine)


def test_a_round_is_known_again_by_how_it_began_whatever_the_dtype_of_its_energies(
    graphs, monkeypatch
):
    monkeypatch.setattr(engine_module, "PAYBACK_S", 0.0)
    x, engine = torch.randn(6, 2, generator=generator(1)), Engine("auto", background=False)
    for _ in range(3):
        run_chain(make("langevin"), x, squares, 10, generator(2), engine=engine)
    round_ = make_stepper(make("langevin"), x.clone(), squares)
    assert engine.block(round_.kernel, squares, round_.state, 10) is not None
    assert len(graphs) == STEPS_AND_END


def test_an_energy_that_is_no_energy_is_refused_before_it_is_compiled(graphs):
    def wide(x: Tensor) -> Tensor:
        return x.square()

    engine = Engine("compiled", steady=True)
    with pytest.raises(ValueError, match=r"^energy: expected one number a chain, .*\(6, 2\)"):
        run_chain(make("langevin"), torch.zeros(6, 2), wide, 10, generator(), engine=engine)
    assert graphs == []


class Auto:
    """An engine told how long rounds of 10 steps took, which nobody ran."""

    def __init__(self, energy: energies.Energy | None = None, shape: tuple[int, ...] = (2,)):
        self.said: list[str] = []
        self.engine = Engine("auto", background=False, say=self.said.append)
        self.kernel, self.energy = make("langevin"), energy or mlp()
        self.state = self.kernel.init(torch.randn(6, *shape), self.energy)

    def rounds(self, num: int, step_s: float) -> None:
        for _ in range(num):
            in_blocks = self.compiled
            self.engine.took(
                10 * step_s, self.kernel, self.energy, self.state, 10, in_blocks=in_blocks
            )

    def until(self, look_s: float, left_s: float, step_s: float, progress: float = 0.0) -> None:
        """Rounds for `look_s` after the run's first progress, by which `left_s` of steps are left,
        but for the last two."""
        self.engine.progress = progress
        self.rounds(1, step_s)
        self.engine.progress = first = progress + 0.01
        self.rounds(1, step_s)
        self.engine.progress = first + (1 - first) * look_s / (look_s + left_s)
        self.rounds(round(look_s / (10 * step_s)) - 3, step_s)

    @property
    def compiled(self) -> bool:
        return self.engine.block(self.kernel, self.energy, self.state, 10) is not None


@pytest.mark.parametrize(
    ("step_s", "patience_s"),
    [
        (engine_module.SHORT_STEP_S / 2, engine_module.PAYBACK_S),
        (engine_module.SHORT_STEP_S * 2, engine_module.LONG_PAYBACK_S),
    ],
)
def test_auto_compiles_only_what_has_gone_on_for_so_long_that_it_may_pay(
    graphs, step_s, patience_s
):
    auto = Auto()
    auto.rounds(round(patience_s / (10 * step_s)) - 2, step_s)
    assert not auto.compiled
    assert graphs == []
    auto.rounds(4, step_s)
    assert auto.compiled
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("winograd", "payback_s"),
    [(True, engine_module.LONG_PAYBACK_S), (False, engine_module.DIRECT_PAYBACK_S)],
)
def test_auto_wants_a_longer_run_for_convolutions_where_the_processor_has_no_winograd(
    winograd, payback_s, graphs, monkeypatch
):
    monkeypatch.setattr(engine_module, "suits_processor", lambda dtype: winograd)
    resnet = energies.make("resnet", event_shape=(1, 8, 8), width=8, multipliers=(1,)).eval()
    step_s, look_s = engine_module.SHORT_STEP_S * 2, engine_module.FIRST_LOOK_S
    for left_s, compiles in [(0.9 * payback_s, False), (1.1 * payback_s, True)]:
        auto = Auto(resnet, (1, 8, 8))
        auto.until(look_s, left_s, step_s)
        auto.rounds(3, step_s)
        assert auto.compiled == compiles
        (line,) = auto.said
        assert f"auto {'compiles' if compiles else 'stays eager'}, since about" in line
        assert f"repays itself in {payback_s:.0f} s" in line
        assert ("gains little from compiled convolutions" in line) == (not winograd)


@pytest.mark.parametrize("payback", ["PAYBACK_S", "LONG_PAYBACK_S"])
def test_auto_compiles_where_what_is_left_of_the_run_repays_it(graphs, payback):
    step_s = engine_module.SHORT_STEP_S * (0.5 if payback == "PAYBACK_S" else 2)
    payback_s = getattr(engine_module, payback)
    for left_s, compiles in [(0.9 * payback_s, False), (1.1 * payback_s, True)]:
        auto = Auto()
        auto.until(engine_module.FIRST_LOOK_S, left_s, step_s, 0.25)  # resumed there
        assert auto.said == []
        auto.rounds(3, step_s)
        assert auto.compiled == compiles
        (line,) = auto.said
        assert ("auto compiles, since about" in line) == compiles
        assert ("auto stays eager, since about" in line) != compiles
        assert f"repays itself in {payback_s:.0f} s" in line
        auto.rounds(9, step_s)
        assert len([line for line in auto.said if "since about" in line]) == 1


def test_auto_does_not_count_rounds_before_the_first_update_nor_take_slow_first_ones_as_usual(
    graphs,
):
    step_s, payback_s = engine_module.SHORT_STEP_S * 0.5, engine_module.PAYBACK_S
    auto = Auto()
    auto.engine.progress = 0.5  # resumed, and the learner takes a minute to start
    auto.rounds(round(60 / (10 * step_s)), step_s)
    auto.engine.progress = 0.51
    auto.rounds(1, 500 * step_s)  # cold
    look_s, left_s = engine_module.FIRST_LOOK_S, 2 * payback_s  # at the pace so far
    auto.engine.progress = 0.51 + 0.49 * look_s / (look_s + left_s)
    auto.rounds(round(0.25 * look_s / (10 * step_s)) + 1, step_s)  # with the cold one 10 s
    assert not auto.compiled
    (line,) = auto.said
    assert "auto stays eager, since about 30 s of steps are left" in line


def test_processes_compile_one_after_another_and_a_hung_one_holds_nobody_up_for_ever(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    inside, leave, order = threading.Event(), threading.Event(), []

    def first() -> None:
        with compiler.one_at_a_time():
            inside.set()
            leave.wait(60)
            order.append("first")

    def second() -> None:
        with compiler.one_at_a_time():
            order.append("second")

    threads = [threading.Thread(target=target) for target in (first, second)]
    threads[0].start()
    assert inside.wait(60)
    with monkeypatch.context() as patched:
        patched.setattr(compiler, "TURN_S", 0.0)
        with compiler.one_at_a_time():
            order.append("impatient")
    threads[1].start()
    threads[1].join(1)
    leave.set()
    for thread in threads:
        thread.join(60)
    assert order == ["impatient", "first", "second"]


@needs_compiler
@pytest.mark.parametrize("background", [True, False])
def test_the_compiler_gives_way_to_rounds_beside_it_and_to_nothing_where_they_wait(
    background, monkeypatch, tmp_path
):
    from torch._inductor import cpp_builder

    source = tmp_path / "nothing.cpp"
    source.write_text("void nothing() {}")
    run, commands, niceness, switch_s = subprocess.run, [], [], []

    def noted(command: list[str], **options: Any) -> Any:
        commands.append(" ".join(command))
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", noted)

    def niceness_here() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def compiles(graph: Any, inputs: list[Tensor]) -> Any:
        # torch's own way to the C++ compiler, without the minute that its code takes there.
        options = cpp_builder.CppOptions()
        cpp_builder.CppBuilder("n", [str(source)], options, output_dir=str(tmp_path)).build()
        niceness.append(niceness_here())
        switch_s.append(sys.getswitchinterval())
        return lambda tensors: graph(*tensors)

    monkeypatch.setattr(engine_module, "compile_graph", compiles)
    usual = niceness_here(), sys.getswitchinterval()
    engine = Engine("compiled", background=background)
    x = torch.randn(6, 2, generator=generator(1))
    run_chain(make("mala"), x, mlp(), 3, generator(2), engine=engine)
    for thread in threading.enumerate():
        if thread.name == "compile":
            thread.join(timeout=500)
    assert engine.compile_s > 0
    (made,) = (command for command in commands if str(source) in command)
    assert (f"nice -n {compiler.NICENESS} " in made) == background
    # Its threads keep their priority: they hold the interpreter, for which the rounds would wait.
    assert niceness == [usual[0]]
    assert switch_s == [compiler.SWITCH_S if background else usual[1]]
    assert (niceness_here(), sys.getswitchinterval()) == usual


def test_auto_keeps_blocks_that_are_faster_and_says_by_how_much(graphs):
    auto, wait_s = Auto(), engine_module.LONG_PAYBACK_S
    auto.rounds(1, 0.08 * wait_s)  # slower by an accident, as the last of these
    auto.rounds(1, 0.05 * wait_s)
    assert auto.said == []
    auto.rounds(engine_module.TRIAL_ROUNDS - 1, 0.04 * wait_s)
    auto.rounds(1, 0.1 * wait_s)
    (line,) = auto.said
    assert "auto runs compiled blocks" in line
    block, alone = (f"{1e3 * share * wait_s:.2f} ms" for share in (0.04, 0.05))
    assert f"a step takes {block} in blocks of 10 and {alone} alone" in line
    auto.rounds(20, 1e3)
    assert auto.compiled
    assert len(auto.said) == 1


def test_auto_goes_back_to_single_steps_where_blocks_are_no_faster(graphs):
    auto = Auto()
    auto.rounds(100, engine_module.SHORT_STEP_S * 1.5)
    auto.rounds(1, engine_module.LONG_PAYBACK_S)
    assert auto.compiled
    auto.rounds(engine_module.TRIAL_ROUNDS, engine_module.SHORT_STEP_S * 1.48)
    assert not auto.compiled
    (line,) = auto.said
    assert "auto stays eager, a step takes 4.44 ms in blocks of 10 and 4.50 ms alone" in line
    auto.rounds(50, engine_module.LONG_PAYBACK_S)
    assert not auto.compiled
    assert len(graphs) == 1


def test_a_steady_engine_decides_before_the_first_round(graphs):
    kernel, energy, x = make("langevin"), mlp(), torch.randn(6, 2, generator=generator(1))
    said: list[str] = []
    auto = Engine("auto", steady=True, say=said.append)
    state = kernel.init(x, energy)
    for _ in range(3):
        auto.took(1e6, kernel, energy, state, 10, in_blocks=False)
        chain = run_chain(kernel, x, energy, 10, generator(2), engine=auto)
        assert torch.equal(chain.position, run_chain(kernel, x, energy, 10, generator(2)).position)
    assert graphs == []
    assert len(said) == 1
    assert "auto is eager, since flow.mode: sync" in said[0]

    # The history of an engine does not show: other lengths first, or a fresh engine.
    one, two = Engine("compiled", steady=True), Engine("compiled", steady=True)
    first = run_chain(kernel, x, energy, 10, generator(2), engine=one).position
    run_chain(kernel, x, energy, 7, generator(3), engine=two)
    assert torch.equal(run_chain(kernel, x, energy, 10, generator(2), engine=two).position, first)


def test_block_sizes_leave_little_over():
    assert [fitting(n, 20) for n in (1, 4, 20, 40, 60, 50, 30, 37)] == [
        1,
        4,
        20,
        20,
        20,
        10,
        15,
        18,
    ]
    assert fitting(60, 3) == 3
    assert fitting(7, 1) == 1


def test_images_are_channels_last_only_where_the_energy_takes_them_so():
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).view(len(x), -1).sum(1)

    resnet = energies.make("resnet", event_shape=(1, 8, 8), width=8, multipliers=(1,)).eval()
    x = torch.rand(3, 1, 8, 8, generator=generator())
    for choice in ("auto", "compiled"):
        assert Engine(choice).channels_last(resnet, x)  # type: ignore[arg-type]
    assert not Engine("eager").channels_last(resnet, x)
    assert not Engine("auto").channels_last(Views(), x)
    assert not Engine("auto").channels_last(lambda x: x.square().flatten(1).sum(1), x)
    kernel = make("langevin", step_size=0.1)
    plain = run_chain(kernel, x, resnet, 5, generator(2))
    last = run_chain(kernel, x, resnet, 5, generator(2), engine=Engine("auto"))
    same_chain(plain, last)


@needs_compiler
def test_beside_the_rounds_nothing_is_traced_that_takes_modules_of_other_threads_for_its_own(
    monkeypatch,
):
    from torch._inductor.loop_body import InterpreterShim

    InterpreterShim._dummy_gm.cache_clear()  # as in a process that has compiled nothing
    trace, made = torch.fx.Tracer.trace, []

    def noted(tracer: torch.fx.Tracer, *args: Any, **kwargs: Any) -> Any:
        # While any of them traces, `Module.__call__` of all threads is its `call_module`.
        stranger = type(tracer).call_module is torch.fx.Tracer.call_module
        made.append((stranger, threading.current_thread().name))
        return trace(tracer, *args, **kwargs)

    monkeypatch.setattr(torch.fx.Tracer, "trace", noted)
    kernel, energy, x = make("langevin"), mlp(), torch.randn(6, 2, generator=generator(1))
    engine = Engine("compiled")
    run_chain(kernel, x, energy, 3, generator(2), engine=engine)
    for thread in threading.enumerate():
        if thread.name == "compile":
            thread.join(timeout=500)
    assert engine.compile_s > 0
    here = threading.current_thread().name
    assert (True, here) in made, "or the test could see nothing"
    assert (False, "compile") in made
    assert (True, "compile") not in made


def test_the_compiler_keeps_a_small_networks_chains_to_rounding():
    energy, kernel = mlp(), make("langevin", clamp=(-2.0, 2.0), grad_clip=0.3)
    x = torch.randn(32, 2, generator=generator(1))
    said: list[str] = []
    engine = Engine("compiled", background=False, say=said.append)
    for _ in range(2):
        blocks = run_chain(kernel, x, energy, 4, generator(2), engine=engine)
        same_chain(run_chain(kernel, x, energy, 4, generator(2)), blocks)
        with torch.no_grad():
            for p in energy.parameters():
                p.mul_(1.5)
    assert len(said) == 1
    assert "runs blocks of 4 steps" in said[0]

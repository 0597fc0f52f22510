"""The gallery's numbers agree with theory, so that no picture shows a wrong curve."""

import sys
from pathlib import Path

import pytest

from ebm_dist import samplers

sys.path.insert(0, str(Path(__file__).parents[3] / "docs/gallery/draw"))
import gallery
import landscapes

QUICK = (
    "hopfield",
    "mode_covering_and_seeking",
    "discretisation_bias",
    "momentum_in_a_flat_valley",
    "regularisation_against_mixing",
    "short_run_and_long_run",
)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    out = tmp_path_factory.mktemp("gallery")
    found = gallery.write_gallery(out, only=QUICK)
    for name in QUICK:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return found


def close(value, expected, error):
    assert abs(value - expected) < 4 * error


def test_langevin_is_biased_as_predicted_and_mala_is_not(numbers):
    found = numbers["discretisation_bias"]
    error = found["relative standard error"]
    close(found["langevin variance at h = 1"], 2.0, 2 * error)
    close(found["mala variance at h = 1"], 1.0, error)


def test_momentum_crosses_the_valley_at_its_own_rate(numbers):
    found = numbers["momentum_in_a_flat_valley"]
    for name, rate in (("langevin", 0.999), ("sghmc", 0.99045)):
        close(
            found[f"{name} mean after 1000"],
            found[f"{name} exact mean"],
            found[f"{name} standard error"],
        )
        assert found[f"{name} contraction"] == pytest.approx(rate, abs=1e-5)


def test_penalty_lowers_curvature_and_slows_mixing(numbers):
    found = numbers["regularisation_against_mixing"]
    assert found["curvature at weight .1"] == pytest.approx(0.85410, abs=1e-5)
    for weight in (".1", "10"):
        assert found[f"measured time at weight {weight}"] == pytest.approx(
            found[f"exact time at weight {weight}"], rel=0.12
        )
    assert found["exact time at weight 10"] > 4 * found["exact time at weight .1"]


def test_short_run_law_is_the_datas_and_the_long_run_law_is_not(numbers):
    found = numbers["short_run_and_long_run"]
    error = found["relative standard error"]
    close(found["variance after 60"], 1.0, error)
    close(found["variance after 600"], 0.58144, 0.58144 * error)


def test_divergences_cover_and_seek(numbers):
    found = numbers["mode_covering_and_seeking"]
    assert found["forward KL"] == pytest.approx(0.46199, abs=1e-5)
    assert found["forward std"] == pytest.approx(10**0.5, abs=1e-3)
    assert found["reverse KL"] == pytest.approx(0.68879, abs=1e-4)
    assert found["reverse mean"] == pytest.approx(2.98, abs=0.01)


def test_hopfield_retrieves_and_errs_as_predicted(numbers):
    found = numbers["hopfield"]
    assert found["glyph bits wrong after retrieval"] == 0
    close(
        found["one-bit error at this load"],
        found["exact at this load"],
        # Bits of one network share its patterns: errors come in clusters of two or so.
        1.5 * found["standard error at this load"],
    )
    assert found["overlap at load .08"] > 0.99
    assert found["overlap at load .26"] < 0.6


TOYS = ("ring", "gaussian_mixture", "checkerboard", "double_well")


def test_every_sampler_of_real_events_is_drawn_on_every_toy():
    members = samplers.FAMILY.members.items()
    # Those of energy matching and of energies with levels have no law on a toy alone.
    own = {"module", "flow_langevin", "simulated_tempering", "predictor_corrector"}
    known = {name for name, section in members if not section.discrete} - own
    assert set(landscapes.kernels(1.0)) == known
    assert {f"toy_{name}" for name in TOYS} <= {picture.name for picture in gallery.PICTURES}


@pytest.mark.slow
def test_sampled_laws_are_the_exact_ones(tmp_path):
    drawn = [*(f"toy_{name}" for name in TOYS), "temperature", "discrete_samplers"]
    found = gallery.write_gallery(tmp_path, only=drawn)
    assert all((tmp_path / f"{name}.png").stat().st_size < 200_000 for name in drawn)
    for toy in TOYS:
        numbers = found[f"toy_{toy}"]
        # Kernels with an accept step; the others have the bias that the figure shows.
        exact = {"mala", "hmc", "nuts", "random_walk", "parallel_tempering", "tempered_transitions"}
        for name in sorted(exact):
            close(
                numbers[f"{name} mean energy"],
                numbers["exact mean energy"],
                numbers[f"{name} standard error"],
            )
    for gap in ("0", "1"):
        wells = found["temperature"]
        close(
            wells[f"dE={gap} left share at T=1"],
            wells[f"dE={gap} exact share at T=1"],
            wells[f"dE={gap} standard error"],
        )
    spins = found["discrete_samplers"]
    for t in ("2.5", "3.5", "5"):
        for name in ("gibbs", "gibbs_with_gradients", "discrete_langevin"):
            close(
                spins[f"T={t} {name} magnetisation"],
                spins[f"T={t} exact magnetisation"],
                spins[f"T={t} {name} standard error"],
            )


def test_command_line_refuses_an_unknown_picture_in_one_line(tmp_path, capsys):
    assert gallery.main([str(tmp_path), "--only", "nonsense"]) == 2
    assert "unknown nonsense; known: toy_ring" in capsys.readouterr().err

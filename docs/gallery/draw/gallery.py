"""Pictures for the documentation, each the statement of one figure: `python gallery.py OUT_DIR`.

Every figure draws what this package's own samplers and energies do beside what theory says, and
returns the numbers of both: a test holds them together, so that no picture shows a wrong curve.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import dynamics
import landscapes
import torch
from PIL import Image

from ebm_dist.core.seeds import derive_seed
from ebm_dist.report.grid import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Plot = Callable[["Figure", torch.Generator], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure and the statement that it shows."""

    name: str
    size: tuple[float, float]
    statement: str
    plot: Plot


TOYS = {
    "ring": "A thin ring, which every sampler reaches and goes round.",
    "gaussian_mixture": "Eight modes of one mass. What moves locally keeps the share of each mode "
    "that the start gave it; the mean energy cannot tell, since the modes are alike.",
    "checkerboard": "Squares behind walls. Langevin and MALA leave the middle ones too full, where "
    "the start put the chains; long trajectories and tempering even them out.",
    "double_well": "Four wells of unequal mass. In the same number of evaluations Langevin has not "
    "yet moved the mass into the lowest one, and its mean energy is too high; samplers that "
    "cross the barriers have.",
}

PICTURES: tuple[Picture, ...] = (
    *(
        Picture(
            f"toy_{name}",
            (13.0, 5.3),
            f"{what} Every chain starts from one Gaussian and pays at most "
            f"{landscapes.NUM_EVALUATIONS:,} evaluations of the energy. A title is red "
            "where the mean energy is more than 4 standard errors off the exact one.",
            landscapes.toy(name),
        )
        for name, what in TOYS.items()
    ),
    Picture(
        "discrete_samplers",
        (12.0, 3.8),
        "Magnetisation of a 4x4 Ising model in a small field: block Gibbs, Gibbs with gradients "
        "and discrete Langevin all reach the enumerated law.",
        landscapes.discrete_samplers,
    ),
    Picture(
        "hopfield",
        (11.0, 4.2),
        "A Hopfield network falls from a corrupted pattern into the stored one. One-bit errors "
        "follow erfc(1/sqrt(2a))/2 in the load a, and retrieval breaks down near a = .138.",
        landscapes.hopfield,
    ),
    Picture(
        "temperature",
        (11.0, 6.2),
        "Wells of one depth keep their masses at every temperature (rescale); wells of different "
        "depth exchange mass as exp(-dE/T) sqrt(k2/k1) (distort).",
        landscapes.temperature,
    ),
    Picture(
        "mode_covering_and_seeking",
        (10.0, 3.6),
        "One Gaussian fitted to two modes: the forward KL of maximum likelihood covers both, the "
        "reverse KL settles on one.",
        landscapes.covering_and_seeking,
    ),
    Picture(
        "discretisation_bias",
        (6.0, 4.2),
        "Unadjusted Langevin heats the target to T_eff = 2T/(2 - ah), without bound as ah nears "
        "2; an accept step (MALA) removes the bias at any step size.",
        dynamics.discretisation_bias,
    ),
    Picture(
        "momentum_in_a_flat_valley",
        (10.0, 4.2),
        "Along a valley of curvature .01 Langevin contracts by .999 a step and SGHMC by .990: "
        "momentum coasts where the gradient is small.",
        dynamics.flat_valley,
    ),
    Picture(
        "regularisation_against_mixing",
        (10.0, 4.0),
        "A gradient penalty lowers the curvature that training settles at, and with it the rate "
        "at which Langevin mixes: smoother is slower.",
        dynamics.regularisation_tradeoff,
    ),
    Picture(
        "short_run_and_long_run",
        (10.0, 4.0),
        "A model trained by chains of 60 steps gives data-like samples after 60 steps. Its own "
        "law is another: run on, the variance falls from 1 to .58.",
        dynamics.short_and_long_run,
    ),
)


def write_gallery(
    out_dir: Path,
    *,
    only: Sequence[str] = (),
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, float]]:
    """Write the pictures and an index of their statements; return each one's numbers.

    Args:
        only: names of pictures; all of them when empty.

    Raises:
        ValueError: a name is unknown.
    """
    known = {picture.name: picture for picture in PICTURES}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ValueError(f"--only: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    out_dir.mkdir(parents=True, exist_ok=True)
    numbers = {}
    for picture in PICTURES:
        if only and picture.name not in only:
            continue
        began = time.perf_counter()
        # A stream of its own for each: a picture is the same drawn alone or with the others.
        generator = torch.Generator().manual_seed(derive_seed(seed, "gallery", picture.name))
        figure = new_figure(picture.size)
        numbers[picture.name] = picture.plot(figure, generator)
        path = out_dir / f"{picture.name}.png"
        save_figure(figure, path, dpi=90)
        _shrink(path)
        say(f"{picture.name}.png  {time.perf_counter() - began:.1f} s")
    if not only:
        (out_dir / "README.md").write_text(_index(numbers), encoding="utf-8")
    return numbers


def _shrink(path: Path) -> None:
    """A palette of 128 colours: a third of the bytes, and no difference that an eye finds."""
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def _index(numbers: dict[str, dict[str, float]]) -> str:
    parts = [
        "# Gallery",
        "",
        "What the mathematics says, as this package's own samplers and energies show it. Drawn by "
        "`make gallery`; a test holds the numbers below each picture against theory.",
        "",
    ]
    for picture in PICTURES:
        title = picture.name.replace("_", " ").capitalize()
        parts += [f"## {title}", "", picture.statement, "", f"![{title}]({picture.name}.png)", ""]
        lines = [f"| {key} | {value:.5g} |" for key, value in numbers[picture.name].items()]
        parts += ["| number | value |", "|---|---|", *lines, ""]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="names of pictures; default all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        write_gallery(options.out_dir, only=options.only, seed=options.seed, say=print)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The config that tempered samplers share: an inner sampler, and rising temperatures."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, PlainSerializer, PositiveFloat, WithJsonSchema, model_validator

from ebm_dist.core.types import EventSpec
from ebm_dist.samplers.kernel import FAMILY, Kernel, KernelSection
from ebm_dist.samplers.module import ModuleKernelSection

Inner = Annotated[
    Any,
    PlainSerializer(lambda k: k.model_dump() if isinstance(k, KernelSection) else repr(k)),
    WithJsonSchema(
        {
            "type": "object",
            "description": "The sampler that moves each copy: a section with a name of its own.",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
        }
    ),
]


class InnerSection(KernelSection):
    """A sampler that moves chains by another one."""

    kernel: Inner
    """The inner sampler, as a section of its own, or a kernel from `make`."""

    @model_validator(mode="before")
    @classmethod
    def _named_kernel(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "kernel" not in data:
            return data
        kernel = data["kernel"]
        if isinstance(kernel, dict):
            params = dict(kernel)
            name = params.pop("name", None)
            if not isinstance(name, str):
                raise ValueError("kernel: needs a name, e.g. {name: mala, step_size: 0.1}")
            if name == "langevin" and not {"temperature", "noise_std"} & params.keys():
                # `temperatures` replaces it, so the config need not give one here.
                params["temperature"] = 1.0
            try:
                kernel = FAMILY.section(name, **params)
            except ValueError as error:
                # The message names keys of the section `sampler`; these are keys of `kernel`.
                raise ValueError(str(error).replace("sampler.", "kernel.")) from None
        elif isinstance(kernel, str):
            raise ValueError(
                f"kernel: give a section such as {{name: {kernel}, ...}}, got the bare name"
            )
        if hasattr(kernel, "temperatures") or isinstance(kernel, InnerSection):
            own = cls.model_fields["name"].default
            raise ValueError(f"kernel: {own} cannot hold another tempered sampler")
        if isinstance(kernel, ModuleKernelSection):
            raise ValueError(
                "kernel: a sampler of your own cannot be moved to other temperatures from outside; "
                "temper it in its own code, with sampler.name: module"
            )
        inner = kernel if isinstance(kernel, KernelSection | Kernel) else None
        if inner is None:
            raise ValueError(f"kernel: expected a sampler section, got {type(kernel).__name__}")
        return {**data, "kernel": kernel}

    def bind(self, spec: EventSpec) -> Self:
        if not isinstance(self.kernel, KernelSection):
            return self
        return self.model_copy(update={"kernel": self.kernel.bind(spec)})

    def inner(self) -> Kernel[Any]:
        """The inner sampler."""
        section = self.kernel
        return section.build() if isinstance(section, KernelSection) else section


class LadderSection(InnerSection):
    """An inner sampler that moves chains at each of several temperatures."""

    kernel: Inner
    """The sampler that moves each copy, as a section of its own, or a kernel from `make`.
    Its temperature and num_steps are not used."""

    temperatures: tuple[PositiveFloat, ...] = Field(min_length=2, max_length=256)
    """In rising order; the first is the temperature of the chains. A geometric sequence is a good
    start."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if any(a >= b for a, b in zip(self.temperatures, self.temperatures[1:])):
            raise ValueError(f"temperatures must rise, got {list(self.temperatures)}")
        return self

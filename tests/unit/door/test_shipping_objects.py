"""Objects of the user that cannot reach a process of Ray: one line with what to do."""

from __future__ import annotations

import threading
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from ebm_dist.cluster.ray_backend import RayBackend
from ebm_dist.cluster.ray_starts import unreadable_argument
from ebm_dist.core.errors import UserError

DIED = """\
The actor died because of an error raised in its creation task, \x1b[36mray::Host.__init__() \
(pid=17504, ip=192.0.2.2, actor_id=785691030d24c45a1ff7982601000000, repr=<Host object at 0x7f>)
  At least one of the input arguments for this task could not be computed:
ray.exceptions.RaySystemError: System error: No module named 'lost_nets'
traceback: Traceback (most recent call last):
ModuleNotFoundError: No module named 'lost_nets'"""


def test_a_module_that_an_actor_lacks_is_one_line_with_its_node_and_what_to_do():
    line = unreadable_argument(Exception(DIED))
    assert line == (
        "runtime.working_dir: the node 192.0.2.2 cannot read a section or object of yours (No "
        "module named 'lost_nets'); install its module there, or set this key to the directory "
        "that holds it, which Ray then ships to every node"
    )
    assert unreadable_argument(Exception("The actor died: out of memory")) is None


class Pickling:
    """A class of actors that pickles what an actor is made of, as Ray's do."""

    def options(self, **options: Any) -> Pickling:
        return self

    def remote(self, make: partial[Any], *rest: Any) -> None:
        raise TypeError(f"Could not serialize the argument {make}\n" * 9)


def test_an_object_that_cannot_be_pickled_is_one_line_with_its_section():
    # Not at the top of the module: Ray reads how it authenticates when it is imported, and tests in
    # this process say so first.
    import ray

    backend = object.__new__(RayBackend)  # no Ray is started for it
    backend.local, backend._own, backend._num_spawned = True, None, {}
    backend._ray = ray
    backend.halt = SimpleNamespace(ailing=lambda: None)  # pyright: ignore[reportAttributeAccessIssue]
    backend._host, backend._memory, backend._plugins = Pickling(), None, ()  # pyright: ignore
    with pytest.raises(UserError) as caught:
        backend.spawn(partial(dict, energy=1, data=threading.Lock()), "learner-0")
    (line,) = str(caught.value).splitlines()
    assert line.startswith("data: cannot be sent to Ray's processes (TypeError: cannot pickle")
    assert line.endswith("or set runtime.backend: inline")
    with pytest.raises(TypeError, match="Could not serialize"):  # for another reason
        backend.spawn(partial(dict, energy=1), "learner-0")

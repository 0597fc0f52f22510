"""Calls that CUDA refuses, made on the card that is not there; prints the error of each."""

from __future__ import annotations

import json
from collections.abc import Callable

import cuda_card
import torch
import torch.distributed as dist

cuda_card.insert()
card, host = torch.ones(3, device="cuda"), torch.ones(3)


def recorded(function: Callable[[], object]) -> Callable[[], object]:
    def record() -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(card.device)
        try:
            with torch.cuda.graph(graph, stream=stream):
                function()
        finally:
            cuda_card.state.capturing = None

    return record


def join() -> None:
    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore())


def reduce_of_the_host() -> None:
    torch.cuda.set_device(0)
    join()
    dist.all_reduce(card)  # what NCCL takes
    dist.all_reduce(host)


fused = torch.optim.Adam([torch.nn.Parameter(card.clone())], fused=True)
fused.param_groups[0]["params"][0].grad = card.clone()
step = fused.state[fused.param_groups[0]["params"][0]]
step |= {"step": torch.zeros(()), "exp_avg": card * 0, "exp_avg_sq": card * 0}

CALLS: dict[str, Callable[[], object]] = {
    "a device without an index": lambda: torch.cuda.set_device(torch.device("cuda")),
    "a device that is not there": lambda: torch.cuda.set_device(1),
    "a group before a device": join,
    "NCCL of memory of the host": reduce_of_the_host,
    "two memories in a sum": lambda: card + host,
    "two memories in a backward": lambda: (card * host.requires_grad_()).sum().backward(),
    "numpy of the card": lambda: card.numpy(),
    "an index of the card into the host": lambda: host[torch.zeros(1, dtype=torch.long).cuda()],
    "noise of the card by the host's generator": lambda: card.normal_(generator=torch.Generator()),
    "noise of the host by the card's": lambda: torch.randn(3, generator=torch.Generator("cuda")),
    "pinning the card": lambda: card.pin_memory(),
    "a stream of the host's tensor": lambda: host.record_stream(torch.cuda.current_stream()),
    "an event of no stream": lambda: torch.cuda.Event().record("here"),
    "a fused step counted on the host": fused.step,
    "a replay of nothing": lambda: torch.cuda.CUDAGraph().replay(),
    "a look at a number in a recording": recorded(lambda: card.sum().item()),
    "a wait in a recording": recorded(torch.cuda.synchronize),
    "noise in a recording": recorded(lambda: card.normal_(generator=torch.Generator("cuda"))),
    "the host in a recording": recorded(lambda: card.copy_(host)),
}


def error_of(call: Callable[[], object]) -> str | None:
    try:
        call()
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


if __name__ == "__main__":
    print(json.dumps({what: error_of(call) for what, call in CALLS.items()}))

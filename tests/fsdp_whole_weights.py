"""Not a test: one of two processes draws from a model that both hold in pieces, then both train it, twice; prints what they
saw as JSON. Launched by test_whole_weights.py."""

import contextlib
import json
from collections.abc import Iterator

import torch
from accelerate.utils import gather_object
from conftest import tiny_llama
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from align.processes import process_state
from align.trainers.whole_weights import whole_weights

process = process_state()
ids = torch.arange(3, 11)[None]


def in_pieces(module) -> bool:
    return all(isinstance(weight, DTensor) for weight in module.parameters())


def sharded(head: bool):
    """A model whose embeddings, norm and head are the root's own, or with `head`, as accelerate has it, in two groups."""
    model = tiny_llama()
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    if head:
        fully_shard(model.model.embed_tokens, reshard_after_forward=True)
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    fully_shard(model)
    register_fsdp_forward_method(model, "generate")  # as the Trainer does
    return model


def rounds(model) -> Iterator[dict[str, bool]]:
    plain, registered = tiny_llama(), vars(model)["generate"]

    def whole_and_equal() -> bool:
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        return all(not isinstance(a, DTensor) and torch.allclose(a, b, atol=1e-6) for a, b in pairs)

    for _ in range(2):
        report = {"in pieces before": in_pieces(model)}
        with whole_weights(model), torch.no_grad():
            report["whole"] = whole_and_equal()
            drawn = []
            for _ in range(2 if process.is_main_process else 0):
                drawn.append(model.generate(ids, max_new_tokens=3, do_sample=False, synced_gpus=False).tolist())
            report["whole after passes"] = whole_and_equal()
        expected = plain.generate(ids, max_new_tokens=3, do_sample=False).tolist()
        report["drawn"] = all(found == expected for found in drawn)
        report["in pieces after"] = in_pieces(model)
        report["method restored"] = vars(model).get("generate") is registered
        for each in (plain, model):
            each(ids, labels=ids).loss.backward()
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        report["gradients"] = all(torch.allclose(a.grad.full_tensor(), b.grad, atol=1e-6) for a, b in pairs)
        for each in (plain, model):
            torch.optim.SGD(each.parameters(), lr=0.1).step()
            each.zero_grad()
        with torch.no_grad():
            model(ids)
        report["a layer frees its weights after a pass"] = in_pieces(model.model.layers)
        with contextlib.suppress(KeyError), whole_weights(model):
            raise KeyError
        report["in pieces after an error"] = in_pieces(model)
        yield report


everyones = gather_object([report for head in (False, True) for report in rounds(sharded(head))])
if process.is_main_process:
    print("SEEN", json.dumps(everyones))

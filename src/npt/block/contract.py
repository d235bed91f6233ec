"""The conversion contract: two checks of every converted block, run on the real model at conversion."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from npt.block.layer import NPTLayer
from npt.block.modes import Mode, running_as
from npt.block.outputs import first_tensor
from npt.block.probing import execution_device
from npt.common.precision import spacing
from npt.errors import REMEDY, ConversionError

logger = logging.getLogger(__name__)

#: The contract takes its tokens from this many of the lowest ids.
PROBED = 64

#: Largest error of an `exact` block at a token, relative to its update there, by dtype: rounding of Norm2(h + a) - z + z.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
#: So many spacings of the hidden state's numbers are no error: both ways round it after each addition. At massive activations
#: an update is a thousandth of the hidden state, and half precision rounds most of it away.
ROUNDINGS = 2.0


@torch.no_grad()
def check_contract(model: Any, layers: list[NPTLayer]) -> None:
    """Runs each converted block alone on real hidden states of a few tokens.

    1. With attention and MLP outputs dropped, block(h) == h bit for bit, or the family's tail of h: nothing else writes to the
       residual stream.
    2. With the exact value, the block's output is the unconverted block's at every token, up to rounding.

    Raises:
        ConversionError: names the block and which of the two it broke.
    """
    if not layers:
        return
    if any(p.is_meta for layer in layers for p in layer.get_base_layer().parameters()):
        logger.warning("conversion contract skipped: the model's weights are on the meta device")
        return
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = [
        layer.get_base_layer().register_forward_pre_hook(_keep_call(calls, layer.index), with_kwargs=True)
        for layer in layers
    ]
    tokens = _tokens_with_a_key(model.get_input_embeddings())
    model.eval()
    # Around a conversion, a caller's autocast would round what is compared.
    with torch.autocast(tokens.device.type, enabled=False):
        try:
            with running_as(layers, Mode.ORIGINAL):
                model(input_ids=tokens, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        for layer in layers:
            for name in layer.family.projections:
                layer.module(name)  # raises where the block has none
            _check_block(layer, *calls[layer.index])


def _tokens_with_a_key(embedding: Any) -> torch.Tensor:
    """(1, 6) token ids, the lowest whose embedding is not zero.

    A padding token's embedding is zero in many models, and stays so in training: z = 0 then, and the input key z / |z|^2 does
    not exist (docs/maths.md says what the block does there). Such a token can't show whether the conversion is right.
    """
    ids = torch.arange(min(PROBED, embedding.weight.shape[0]), device=execution_device(embedding))
    has_key = (embedding(ids[None])[0] != 0).any(-1)
    left_out, ids = ids[~has_key].tolist(), ids[has_key]
    if not len(ids):
        raise ConversionError(
            f"the embeddings of the first {PROBED} tokens are all zero, so no block can be checked; load the model's weights"
        )
    if left_out:
        logger.info("conversion contract: tokens %s have a zero embedding and are left out", left_out)
    return ids[torch.arange(6, device=ids.device) % len(ids)][None]


def _keep_call(calls: dict[int, Any], index: int) -> Any:
    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[index] = (args, kwargs)

    return keep


def _check_block(layer: NPTLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    block = layer.get_base_layer()
    hidden_states = args[0] if args else kwargs["hidden_states"]

    def run(mode: Mode) -> torch.Tensor:
        with running_as([layer], mode):
            return first_tensor(block(*args, **kwargs))

    original, zeroed, exact = run(Mode.ORIGINAL), run(Mode.ZERO), run(Mode.EXACT)
    name = f"block {layer.index} ({type(block).__name__})"
    for what, values in (("what reaches it", hidden_states), ("its output", original)):
        if not values.isfinite().all():
            raise ConversionError(f"{name}: {what} is not finite in the unconverted model; {REMEDY}")
    tail = layer.family.tail
    unchanged = hidden_states if tail is None else tail(block, hidden_states, *args[1:], **_rest(kwargs))
    if not torch.equal(zeroed, unchanged):
        raise ConversionError(
            f"{name} breaks the conversion contract: with attention and MLP dropped it should return its input, but "
            f"differs by up to {(zeroed - unchanged).abs().max():.3g} (a post-norm block, or a wrong line in FAMILIES)"
        )
    before, right, found = (x.double() for x in (unchanged, original, exact))
    excess = (found - right).abs() - ROUNDINGS * spacing(unchanged, original)
    error, update = excess.clamp_min(0).norm(dim=-1), (right - before).norm(dim=-1)
    # Not above, rather than below: NaN is an error.
    wrong = ~(error <= TOLERANCE.get(original.dtype, 1e-1) * update)
    if wrong.any():
        worst = (error / update.clamp_min(torch.finfo(torch.float64).tiny))[wrong].max()
        raise ConversionError(
            f"{name} breaks the conversion contract: with the exact value its output should be the unconverted block's, "
            f"but differs by {worst:.3g} of the update (wrong tap, norm or MLP path in FAMILIES)"
        )


def _rest(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "hidden_states"}

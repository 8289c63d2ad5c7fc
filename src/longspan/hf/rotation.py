"""Queries and keys as they were before the model rotated them, for a memory without positions.

A rotary embedding turns pairs of coordinates by angles that the model hands to each attention
module as (cos, sin). The attention interface gets queries and keys turned already, so they are
turned back by the model's own function and -sin. Models whose rotary scaling multiplies cos and
sin by a (YaRN, LongRoPE) lengthen both by a; turning twice makes that a^2 = cos^2 + sin^2, which
is divided out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LongspanError, PatchError
from .compat import (
    ROTATE,
    attention_functions,
    get_implementation,
    mask_functions,
    set_implementation,
)
from .layers import AttentionLayer
from .masks import longspan_mask
from .positions import LEARNED

__all__ = ["HANDED_OVER", "Rotation", "find_rotations", "hand_over"]

HANDED_OVER = "longspan_rotation"  # keyword under which a module gets (cos, sin) back
_PROBE = "longspan_probe"
_TOKENS = 5  # of the check: the last is turned by up to 4 radians
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.06}

Angles = tuple[Tensor, Tensor]  # cos and sin, (B or 1, N, R)


@dataclass(eq=False)
class Rotation:
    """How one attention layer turns its queries and keys.

    function: the model's `apply_rotary_pos_emb`; None if the layer turns nothing.
    size: leading coordinates of a head that are turned; the rest pass through.
    angles: the model's rotary module, as position_ids (1, N) and a tensor that says device and
        dtype -> (cos, sin); None where the module was not found.
    """

    function: Callable[..., Any] | None = None
    size: int = 0
    angles: Callable[[Tensor, Tensor], Angles] | None = None
    _tables: dict[Any, Angles] = field(default_factory=dict)

    def unrotate(self, query: Tensor, key: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor]:
        """(B, H, N, D) and (B, H_kv, N, D) without positions; computed in float32 at least."""
        if self.function is None or angles is None:
            return query, key
        cos, sin = (_wide(t) for t in angles)
        length = (cos * cos + sin * sin).mean(-1)[:, None, :, None]
        turned = self.function(*self._leading(query, key), cos, -sin)
        return self._join(query, turned[0] / length), self._join(key, turned[1] / length)

    def rotate(self, query: Tensor, key: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """Turn queries and keys as the model does."""
        assert self.function is not None, "the layer turns something"
        cos, sin = (_wide(t) for t in angles)
        turned = self.function(*self._leading(query, key), cos, sin)
        return self._join(query, turned[0]), self._join(key, turned[1])

    def restarted(
        self, query: Tensor, key: Tensor, first: int, length: int
    ) -> tuple[Tensor, Tensor] | None:
        """Plain queries and keys of tokens first, first + 1, ..., turned by place in the segment.

        Differences inside a segment stay as they are and angles stay small, however long the
        stream is. None where the rotary module was not found.
        """
        if self.function is None or self.angles is None:
            return None
        cos, sin = self._table(query, length)
        place = torch.arange(first, first + query.shape[2], device=query.device) % length
        return self.rotate(query, key, (cos[:, place], sin[:, place]))

    def _table(self, like: Tensor, length: int) -> Angles:
        name = (length, like.dtype, like.device)
        if name not in self._tables:
            assert self.angles is not None, "asked for only where it is known"
            positions = torch.arange(length, device=like.device)[None]
            with torch.no_grad():
                self._tables[name] = self.angles(positions, like)
        return self._tables[name]

    def _leading(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return _wide(query[..., : self.size]), _wide(key[..., : self.size])

    def _join(self, whole: Tensor, turned: Tensor) -> Tensor:
        turned = turned.to(whole.dtype)
        if self.size == whole.shape[-1]:
            return turned
        return torch.cat((turned, whole[..., self.size :]), -1)


def hand_over(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook: the module's own angles reach the attention function as a keyword."""
    angles = _angles_in(args, kwargs)
    return None if angles is None else (args, {**kwargs, HANDED_OVER: angles})


def find_rotations(model: nn.Module, layers: list[AttentionLayer]) -> dict[int, Rotation]:
    """How each of these layers turns queries and keys: found and checked by running five tokens.

    What the layer gave to its rotary function is compared with what is turned back from what it
    gave to the attention interface.

    Raises:
        PatchError: a layer turns its vectors in a way that this does not reproduce, or the model
            adds position vectors to its input.
    """
    _refuse_learned(model)
    seen = _watch(model, layers)
    if any(not note.calls for note in seen.values()):
        moved = _watch(model, layers, first=_TOKENS)
        for layer in layers:
            _check_still(layer, seen[layer.order], moved[layer.order])
    return {layer.order: _rotation_of(layer, seen[layer.order]) for layer in layers}


@dataclass(eq=False)
class _Seen:
    """One layer in the check: angles handed to it, calls of its rotary function, what came out."""

    angles: Angles | None = None
    source: Callable[[Tensor, Tensor], Angles] | None = None
    calls: list[tuple[Any, Tensor, Tensor]] = field(default_factory=list)
    query: Tensor | None = None
    key: Tensor | None = None


def _rotation_of(layer: AttentionLayer, seen: _Seen) -> Rotation:
    if seen.query is None or seen.key is None:
        raise PatchError(
            f"model: {layer.name} never called transformers' attention interface, so a patch would "
            "be ignored. Use longspan.nn.InfiniAttention in a model of yours."
        )
    if not seen.calls:
        return Rotation()
    refusal = f"{len(seen.calls)} calls of {ROTATE}, angles {'' if seen.angles else 'not '}found"
    if len(seen.calls) == 1 and seen.angles is not None:
        function, query, key = seen.calls[0]
        size = seen.angles[0].shape[-1]
        for count in (size, 2 * size):
            if count > seen.query.shape[-1]:
                continue
            rotation = Rotation(function, count, seen.source)
            try:
                plain = rotation.unrotate(seen.query, seen.key, seen.angles)
            except RuntimeError:  # shapes do not fit: not the way this model does it
                continue
            if _same(plain[0], query) and _same(plain[1], key):
                return rotation
        refusal = f"{ROTATE} with -sin does not undo it"
    raise PatchError(
        f"model: {layer.name} turns queries and keys in a way that cannot be taken back "
        f"({refusal}), and positions must not enter the memory. Leave the layer out (layers=...), "
        "or use longspan.infini_attention with memory_query and memory_key in the model's code."
    )


def _check_still(layer: AttentionLayer, here: _Seen, there: _Seen) -> None:
    """Layers without a rotary function: their queries must not depend on positions."""
    if here.calls or here.query is None or there.query is None:
        return
    if not torch.equal(here.query, there.query):
        raise PatchError(
            f"model: {layer.name} puts positions into its queries without calling {ROTATE}, so "
            "that they cannot be taken back, and positions must not enter the memory. Leave the "
            "layer out (layers=...), or use longspan.infini_attention with memory_query and "
            "memory_key in the model's code."
        )


def _same(found: Tensor, wanted: Tensor) -> bool:
    """Whether the first coordinates are those that went into the rotary function."""
    if wanted.shape[-1] > found.shape[-1] or wanted.shape[:-1] != found.shape[:-1]:
        return False
    error = (found[..., : wanted.shape[-1]].double() - wanted.double()).abs().max()
    return bool(error <= _TOLERANCE.get(wanted.dtype, 0.06) * wanted.double().abs().max())


def _watch(model: nn.Module, layers: list[AttentionLayer], first: int = 0) -> dict[int, _Seen]:
    """Run a few tokens, with attention that gives zeros, and note what each layer does.

    Without attention, queries depend on positions only where a layer turns them. `first` is the
    position of the first token.
    """
    seen = {layer.order: _Seen() for layer in layers}
    order_of = {id(layer.module): layer.order for layer in layers}
    sources: list[tuple[Tensor, Callable[[Tensor, Tensor], Angles]]] = []
    current: list[int | None] = [None]

    def note_source(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if isinstance(output, tuple) and len(output) == 2:
            sources.append((output[0], _source(module, args, kwargs)))

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        order = order_of[id(module)]
        current[0], note = order, seen[order]
        note.angles = _angles_in(args, kwargs)
        if note.angles is not None:
            known = (make for cos, make in sources if note.angles and cos is note.angles[0])
            note.source = next(known, None)

    def end(*_: Any) -> None:
        current[0] = None

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        if id(module) in order_of:
            note = seen[order_of[id(module)]]
            note.query, note.key = query.detach(), key.detach()
        batch, heads, count, _dim = query.shape
        return value.new_zeros(batch, count, heads, value.shape[-1]), None

    def record(function: Any, query: Tensor, key: Tensor) -> None:
        if current[0] is not None:
            seen[current[0]].calls.append((function, query.detach(), key.detach()))

    with ExitStack() as stack:
        for module in model.modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                hook = module.register_forward_hook(note_source, with_kwargs=True)
                stack.callback(hook.remove)
        for layer in layers:
            stack.callback(layer.module.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(layer.module.register_forward_hook(end).remove)
        stack.enter_context(_recorded({type(layer.module) for layer in layers}, record))
        stack.enter_context(_attending(model, attention))
        _run(model, first)
    return seen


def _source(module: nn.Module, args: Any, kwargs: Any) -> Callable[[Tensor, Tensor], Angles]:
    """The rotary module as a function of positions; whatever else it was given stays."""

    def angles(positions: Tensor, like: Tensor) -> Angles:
        given = dict(kwargs)
        rest = list(args)
        for name, index, value in (("x", 0, like), ("position_ids", 1, positions)):
            if name in given or len(rest) <= index:
                given[name] = value
            else:
                rest[index] = value
        cos, sin = module(*rest, **given)
        return cos, sin

    # keep no activations of the check alive
    args = tuple(None if isinstance(item, Tensor) else item for item in args)
    kwargs = {name: None if isinstance(v, Tensor) else v for name, v in kwargs.items()}
    return angles


@contextmanager
def _recorded(classes: set[type], record: Callable[[Any, Tensor, Tensor], None]) -> Iterator[None]:
    """The rotary functions of these classes' files, each call noted; put back at the end."""
    spaces = {id(space): space for space in (vars(sys.modules[c.__module__]) for c in classes)}
    before = [(space, space[ROTATE]) for space in spaces.values() if ROTATE in space]

    def noting(function: Any) -> Any:
        def call(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            record(function, query, key)
            return function(query, key, *args, **kwargs)

        return call

    for space, function in before:
        space[ROTATE] = noting(function)
    try:
        yield
    finally:
        for space, function in before:
            space[ROTATE] = function


@contextmanager
def _attending(model: nn.Module, function: Any) -> Iterator[None]:
    """All modules of the model attend by `function`; undone at the end."""
    found = {
        id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c is not None
    }
    before = [(config, get_implementation(config)) for config in found.values()]
    attention_functions()[_PROBE], mask_functions()[_PROBE] = function, longspan_mask
    try:
        for config, _ in before:
            set_implementation(config, _PROBE)
        yield
    finally:
        for config, name in before:
            set_implementation(config, name)
        del attention_functions()[_PROBE], mask_functions()[_PROBE]


def _run(model: Any, first: int) -> None:
    modes = {module: module.training for module in model.modules()}
    weight = model.get_input_embeddings().weight
    tokens = torch.arange(_TOKENS, device=weight.device)[None] % weight.shape[0]
    model.eval()
    try:
        with torch.no_grad():
            positions = torch.arange(first, first + _TOKENS, device=weight.device)[None]
            model(input_ids=tokens, use_cache=False, position_ids=positions)
    except LongspanError:
        raise
    except Exception as error:
        raise PatchError(
            f"model: {type(model).__name__} failed on {_TOKENS} tokens of input_ids while its "
            f"rotary embedding was checked: {error} Mend the cause, or pass a model that takes "
            "input_ids alone."
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def _refuse_learned(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in LEARNED:
            raise PatchError(
                f"model: {name} adds learned position vectors to the input, which then enter the "
                "memory and end with its table. Infini-attention takes models with rotary "
                "positions or none. Use another model."
            )


def _angles_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Angles | None:
    for item in (kwargs.get("position_embeddings"), *args):
        pair = isinstance(item, (tuple, list)) and len(item) == 2
        if pair and all(isinstance(part, Tensor) for part in item):
            return item[0], item[1]
    return None


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()

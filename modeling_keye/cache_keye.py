"""Cache layers that grow in place.

The library's dynamic layers concatenate at every step, which copies the whole cache per generated token. These keep
spare room behind the visible part, so that a token costs its own bytes (amortised O(1)). They replace the library's
layers inside the user's own `DynamicCache` on first use; static caches are left alone.

Layout per layer: MLA stores the latent and the rotary key as one row, keys [B, 1, T, C + R] and values [B, 1, T, 0];
GQA stores keys and values [B, G, T, D]; indexer keys are [B, T, Di].
"""

import torch
from transformers.cache_utils import Cache, DynamicIndexedLayer, DynamicLayer, StaticLayer

_MIN_SPARE_TOKENS = 256
# Queries of a decoding step, drafts of speculative decoding among them; more are a prefill.
_LONGEST_STEP = 16


class _Buffer:
    """A tensor that grows along dimension `dim`; `view` is the used part and shares memory with the buffer."""

    def __init__(self, dim: int):
        self.dim = dim
        self.storage: torch.Tensor | None = None

    def append(self, view: torch.Tensor | None, new: torch.Tensor, expected: int) -> torch.Tensor:
        """`view` extended by `new` along `dim`. Copies `view` only when the spare room is used up, or when `view` is
        no longer a prefix of the buffer (after a beam reorder, for example)."""
        length = 0 if view is None else view.shape[self.dim]
        needed = length + new.shape[self.dim]
        if torch.is_grad_enabled():
            # An earlier step may have saved the view for its backward: writing in place would break its graph.
            self.storage = None
            return new if length == 0 else torch.cat([view, new], dim=self.dim)
        if not self._holds(view, new, needed):
            shape = list(new.shape)
            shape[self.dim] = max(needed, expected) + max(_MIN_SPARE_TOKENS, needed // 4)
            self.storage = new.new_empty(shape)
            if length:
                self.storage.narrow(self.dim, 0, length).copy_(view)
        self.storage.narrow(self.dim, length, new.shape[self.dim]).copy_(new)
        return self.storage.narrow(self.dim, 0, needed)

    def reorder(self, view: torch.Tensor | None, order: torch.Tensor) -> torch.Tensor | None:
        """`view` with its first dimension in the given order."""
        if view is None:
            return None
        picked = view.index_select(0, order.to(view.device))
        if picked.shape != view.shape or not self._holds(view, view, view.shape[self.dim]):
            return picked
        return view.copy_(picked)

    def _holds(self, view: torch.Tensor | None, new: torch.Tensor, needed: int) -> bool:
        storage = self.storage
        if storage is None or storage.shape[self.dim] < needed or storage.shape[0] != new.shape[0]:
            return False
        if storage.dtype != new.dtype or storage.device != new.device:
            return False
        if storage.is_inference() and not torch.is_inference_mode_enabled():
            return False  # made in inference mode, it cannot be written outside of it
        return view is None or (view.data_ptr() == storage.data_ptr() and view.stride() == storage.stride())


class KeyeCacheLayer(DynamicIndexedLayer):
    """Keys, values and indexer keys in growing buffers; crop, reorder and batch operations are the library's."""

    def __init__(self, expected_tokens: int = 0, **kwargs):
        super().__init__()
        self.expected_tokens = expected_tokens
        self._key_buffer, self._value_buffer, self._indexer_buffer = _Buffer(2), _Buffer(2), _Buffer(1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, G, S, D] states and return all of them, [B, G, T, D]."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
        self.keys = self._key_buffer.append(self.keys, key_states, self.expected_tokens)
        self.values = self._value_buffer.append(self.values, value_states, self.expected_tokens)
        return self.keys, self.values

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Append indexer keys [B, S, Di] and return all of them, [B, T, Di]."""
        if not self.is_indexer_initialized:
            self.indexer_dtype, self.indexer_device = indexer_key_states.dtype, indexer_key_states.device
            self.is_indexer_initialized = True
        self.indexer_keys = self._indexer_buffer.append(self.indexer_keys, indexer_key_states, self.expected_tokens)
        return self.indexer_keys

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Sequences in the order of `beam_idx` [B], inside the buffers as long as these hold the cache."""
        self.keys = self._key_buffer.reorder(self.keys, beam_idx)
        self.values = self._value_buffer.reorder(self.values, beam_idx)
        self.indexer_keys = self._indexer_buffer.reorder(self.indexer_keys, beam_idx)

    def reset(self) -> None:
        """Forget everything, buffers included."""
        self.__init__(self.expected_tokens)

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]


def cached_length(cache: Cache | None, num_queries: int) -> int | torch.Tensor:
    """How many tokens the cache holds, which is the slot of the next one.

    An int, but for a step of a few queries over a static cache in use, without gradients, that is being compiled or
    captured in a CUDA graph: there an int64 tensor [], so that the graph holds for every slot. It is a copy: the cache
    counts on in place.
    """
    length = 0 if cache is None else cache.get_seq_length()
    if not isinstance(length, torch.Tensor):
        return length
    if num_queries > _LONGEST_STEP or torch.is_grad_enabled():
        return int(length)
    if torch.compiler.is_compiling() or (length.is_cuda and torch.cuda.is_current_stream_capturing()):
        return length.clone()
    return int(length)


def refuse_full_cache(cache: Cache, num_tokens: int) -> None:
    """Raises `ValueError` where the layers of a static cache have no room for `num_tokens`."""
    rooms = [layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)]
    if rooms and num_tokens > min(rooms):
        raise ValueError(
            f"The static cache holds {min(rooms)} tokens, and with this input there are {num_tokens}. Make one with a "
            "larger `max_cache_len`."
        )


def adopt_growing_layers(cache: Cache, num_layers: int, expected_tokens: int) -> None:
    """Make the unused dynamic layers of `cache` growing ones, with room for `expected_tokens` reserved.

    Layers that already hold tokens, and layers of any other kind (static, offloaded, sliding), stay as they are.
    """
    if getattr(cache, "offloading", False):
        raise ValueError("An offloaded cache does not wait for indexer keys; use the default cache instead.")
    if getattr(cache, "is_compileable", False):
        return
    lazy = getattr(cache, "layer_class_to_replicate", None)
    if lazy is not None and lazy in (DynamicLayer, DynamicIndexedLayer):
        cache.layers.extend(KeyeCacheLayer(expected_tokens) for _ in range(len(cache.layers), num_layers))
    for i, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, DynamicIndexedLayer) and not layer.is_initialized:
            cache.layers[i] = KeyeCacheLayer(expected_tokens)
        elif hasattr(layer, "expected_tokens"):
            layer.expected_tokens = max(layer.expected_tokens, expected_tokens)

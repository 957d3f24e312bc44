"""MiniMax's cache; in a file of its own, since it needs transformers' model code."""

from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer
from transformers.models.minimax.modeling_minimax import MiniMaxCache


class LightningCache(MiniMaxCache):
    """transformers' cache of MiniMax, its states held as all other models' are: in `layers[i].recurrent_states`.

    transformers' own leaves them where they are when a beam search reorders it, and where the first layer is recurrent
    it counts no tokens.
    """

    __len__ = Cache.__len__
    batch_repeat_interleave = Cache.batch_repeat_interleave
    batch_select_indices = Cache.batch_select_indices

    def recurrent_layer(self, layer_idx: int) -> LinearAttentionLayer:
        """The entry of a recurrent layer, which is made when first asked for."""
        while len(self.layers) <= layer_idx:
            self.layers.append(DynamicLayer())
        layer = self.layers[layer_idx]
        if not isinstance(layer, LinearAttentionLayer):
            layer = self.layers[layer_idx] = LinearAttentionLayer()
        return layer

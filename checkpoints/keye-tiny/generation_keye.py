"""What `generate` needs to know about videos: positions on three axes, media encoded once, prefill in chunks.

The hooks overridden here are called by every supported release of the library; where a newer release already does part
of the work (encoding before beams are expanded), the result arrives in the same place.
"""

import torch
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

_MEDIA = (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw"))


class KeyeGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a model whose `self.model` is a `KeyeModel`."""

    def adjust_generation_fn(self, *args, **kwargs):
        super().adjust_generation_fn(*args, **kwargs)
        self.suppress_placeholders()

    def suppress_placeholders(self) -> None:
        """Keep `generate` from writing a placeholder, which would stand for pixels that nobody gave.

        A published `generation_config.json` says nothing about them; a list that the user gave stays as it is.
        """
        if self.generation_config.suppress_tokens is None:
            self.generation_config.suppress_tokens = [self.config.image_token_id, self.config.video_token_id]

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        # The first hook that sees what the user passed, before positions are made and media are encoded.
        ids, past = model_kwargs.get("input_ids", inputs), model_kwargs.get("past_key_values")
        if ids is not None and past is not None and (past_length := int(past.get_seq_length())):
            model_kwargs = self._without_cached_media(ids, past_length, dict(model_kwargs))
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    def _without_cached_media(self, input_ids, past_length: int, model_kwargs: dict) -> dict:
        """A conversation goes on: of all its media, as the processor prepares them, those that the cache does not hold.

        Media of the new tokens alone, as one may pass them oneself, stay as they are.
        """
        merged = self.config.vision_config.spatial_merge_size**2
        for modality, pixels, grid in _MEDIA:
            values, grid_thw = model_kwargs.get(pixels), model_kwargs.get(grid)
            if values is None or grid_thw is None:
                continue
            places = input_ids == getattr(self.config, f"{modality}_token_id")
            patches = grid_thw.prod(dim=-1)
            lengths, cached = (patches // merged).tolist(), places[:, :past_length].sum(dim=1).tolist()
            if not any(cached) or sum(lengths) != int(places.sum()):
                continue
            new, rest = [], iter(lengths)
            for in_row, in_cache in zip(places.sum(dim=1).tolist(), cached):
                seen = 0
                while seen < in_row and (length := next(rest, None)) is not None:
                    seen += length
                    new.append(seen > in_cache)
            if sum(length for length, is_new in zip(lengths, new) if is_new) != int(places[:, past_length:].sum()):
                raise ValueError(
                    f"The cache ends within one of the {modality}s of the prompt. Crop it to where the {modality} "
                    "begins."
                )
            new = torch.tensor(new, device=grid_thw.device)
            seconds = model_kwargs.get("second_per_grid_ts")
            if modality == "video" and seconds is not None and len(seconds) == len(new):
                model_kwargs["second_per_grid_ts"] = [x for x, is_new in zip(seconds, new.tolist()) if is_new]
            if not new.any():
                del model_kwargs[pixels], model_kwargs[grid]
                continue
            model_kwargs[grid] = grid_thw[new]
            model_kwargs[pixels] = values[new.repeat_interleave(patches).to(values.device)]
        return model_kwargs

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """[B, S], or [4, B, S] (text row, then time, height, width) for three-axis models."""
        text = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        if self.config.text_config.mrope_section is None:
            return text
        ids = model_kwargs.get("input_ids")
        ids = inputs_tensor if ids is None or ids.shape[1] == 0 else ids
        ids = None if ids.is_floating_point() else ids
        past = model_kwargs.get("past_key_values")
        past_length = 0 if past is None else int(past.get_seq_length())
        if ids is not None and ids.shape[1] == text.shape[-1]:
            ids = ids[:, past_length:]
        media = {name: model_kwargs.get(name) for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
        positions = self.model.get_continued_positions(
            ids, text.shape[-1] - past_length, model_kwargs.get("attention_mask"), past, **media
        )
        if positions is None:
            return torch.cat([text[None], text.expand(3, -1, -1)])
        # What is cached has its positions; only the row length must match the library's.
        cached = torch.zeros(3, text.shape[0], past_length, dtype=torch.long, device=text.device)
        positions = torch.cat([cached, positions.to(text.device).expand(-1, text.shape[0], -1)], dim=-1)
        return torch.cat([text[None], positions])

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ):
        """Encode the media once, before prefill, and repeat inputs and features per beam.

        Newer releases of the library encode before they call this; older ones do not, so both arrive here.
        """
        encoded = dict(model_kwargs.pop("mm_encoder_outputs", None) or {})
        for modality, pixels, grid in _MEDIA:
            values, grid_thw = model_kwargs.pop(pixels, None), model_kwargs.pop(grid, None)
            if values is not None:
                encoded[modality] = getattr(self.model, f"get_{modality}_features")(values, grid_thw, return_dict=True)
        model_kwargs.pop("second_per_grid_ts", None)
        if expand_size > 1:
            position_ids = model_kwargs.pop("position_ids", None)
            for modality, output in encoded.items():
                encoded[modality] = self._expand_features(input_ids, modality, output, expand_size)
            input_ids, model_kwargs = super()._expand_inputs_for_generation(
                expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
            )
            if position_ids is not None:
                model_kwargs["position_ids"] = position_ids.repeat_interleave(expand_size, dim=position_ids.dim() - 2)
        if encoded:
            model_kwargs["mm_encoder_outputs"] = encoded
        return input_ids, model_kwargs

    def _expand_features(self, input_ids, modality: str, output, expand_size: int) -> BaseModelOutputWithPooling:
        """The features of each sequence, repeated once per beam."""
        if input_ids is None or input_ids.shape[1] == 0:
            raise ValueError(
                "Beams over images or videos need `input_ids`; `inputs_embeds` alone do not show where they are."
            )
        places = input_ids == getattr(self.config, f"{modality}_token_id")
        tokens = self.model.check_features(places, modality, output)
        per_sequence = tokens.split(places.sum(dim=1).tolist())
        repeated = [part for part in per_sequence for _ in range(expand_size)]
        return BaseModelOutputWithPooling(pooler_output=tuple(repeated))

    def prepare_inputs_for_generation(
        self, input_ids, *args, inputs_embeds=None, is_first_iteration: bool = False, **kwargs
    ):
        # The library looks for `inputs_embeds` in this signature before it generates from embeddings.
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        past = kwargs.get("past_key_values")
        if not is_first_iteration and past is not None and past.get_seq_length():
            inputs.pop("mm_encoder_outputs", None)  # the features are in the cache by now
        elif kwargs.get("mm_encoder_outputs") is not None:
            # The library withholds them from the prefill of a draft model, which needs them as well.
            inputs["mm_encoder_outputs"] = kwargs["mm_encoder_outputs"]
        return inputs

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        # The decoder chunks by itself, with any kind of prompt and in every supported release of the library.
        chunk, generation_config.prefill_chunk_size = generation_config.prefill_chunk_size, None
        if chunk is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        try:
            model_kwargs = {**model_kwargs, "prefill_chunk_size": chunk}
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            generation_config.prefill_chunk_size = chunk

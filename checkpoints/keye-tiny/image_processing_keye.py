"""Still images to patches, with the resizing rule of each Keye family. Pure torch and Pillow, no torchvision."""

import os
from typing import Any

import PIL.Image
import PIL.ImageOps
import torch
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import validate_kwargs
from transformers.processing_utils import ImagesKwargs

from .frame_budget_keye import (
    DEFAULT_FAMILY,
    check_pixel_limits,
    family_budget,
    refuse_unsupported,
    resize_pixels,
    smart_resize,
)
from .pixels_keye import frame_to_tensor, load_picture, normalize_pixels, to_patches


class KeyeImagesKwargs(ImagesKwargs, total=False):
    """
    family (`str`): whose constants to use: "keye_vl_preview", "keye_vl_1_5", "keye_vl_671b" or "keye_vl_2".
    min_pixels, max_pixels (`int`): limits for the area of one image.
    patch_size, merge_size (`int`): side of a patch in pixels, side of a token in patches.
    """

    family: str | None
    min_pixels: int | None
    max_pixels: int | None
    patch_size: int | None
    merge_size: int | None


class KeyeImageProcessor(BaseImageProcessor):
    """Turns images into `pixel_values` [n_patches, 3, patch_size, patch_size] (row by row within each image) and
    `image_grid_thw` int64 [n_images, 3] with rows (1, height, width) in patches."""

    valid_kwargs = KeyeImagesKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]

    family = DEFAULT_FAMILY
    patch_size = 14
    merge_size = 2
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)

    @property
    def backend(self) -> str:
        return "torch"

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Load every path, address or base64 text in a (nested) list; images already loaded stay as they are, but for
        the rotation that their file asks for."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return load_picture(image_url_or_urls)
        if isinstance(image_url_or_urls, PIL.Image.Image):
            return PIL.ImageOps.exif_transpose(image_url_or_urls)
        return image_url_or_urls

    def preprocess(self, images: Any, **kwargs) -> BatchFeature:
        validate_kwargs(
            captured_kwargs=kwargs.keys(),
            valid_processor_keys=[*self.valid_kwargs.__annotations__, "return_tensors"],
        )
        options = self._options(kwargs)
        budget = self._budget(options)
        patches, rows = [], []
        for image in flatten_images(self.fetch_images(images)):
            pixels = frame_to_tensor(
                image, options["input_data_format"], budget.alpha_on_white, scaled=not options["do_rescale"]
            )
            if options["device"] is not None:
                pixels = pixels.to(options["device"])
            pixels = resize_pixels(pixels[None], self._size(*pixels.shape[1:], options), budget.image_resample)
            patches.append(to_patches(normalize_pixels(pixels, options), options["patch_size"]))
            rows.append([1, *(side // options["patch_size"] for side in pixels.shape[2:])])
        if not patches:
            raise ValueError("the list of images is empty; give at least one image or images=None.")
        features = {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(rows, dtype=torch.int64)}
        return BatchFeature(features, tensor_type=kwargs.get("return_tensors"))

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Patches of an image of the given size."""
        options = self._options(images_kwargs or {})
        new_height, new_width = self._size(height, width, options)
        return (new_height // options["patch_size"]) * (new_width // options["patch_size"])

    def _options(self, call: dict) -> dict:
        options = {name: getattr(self, name, None) for name in self.valid_kwargs.__annotations__}
        options.update({name: value for name, value in call.items() if name in options and value is not None})
        refuse_unsupported(options)
        check_pixel_limits(options)
        return options

    def _budget(self, options: dict):
        token_pixels = (options["patch_size"] * options["merge_size"]) ** 2
        limits = {
            "image_min_tokens": options["min_pixels"] and max(1, options["min_pixels"] // token_pixels),
            "image_max_tokens": options["max_pixels"] and max(1, options["max_pixels"] // token_pixels),
        }
        return family_budget(options["family"], image_resample=options["resample"], **limits)

    def _size(self, height: int, width: int, options: dict) -> tuple[int, int]:
        factor = options["patch_size"] * options["merge_size"]
        if not options["do_resize"]:
            if height % factor or width % factor:
                raise ValueError(
                    f"do_resize=False needs images whose sides are multiples of {factor}, got {height} x {width}; "
                    "resize them or leave do_resize on."
                )
            return height, width
        budget = self._budget(options)
        # The caller's limits count in pixels, exactly; the family's in whole tokens.
        low = options["min_pixels"] or budget.image_min_tokens * factor**2
        high = options["max_pixels"] or budget.image_max_tokens * factor**2
        return smart_resize(height, width, low, high, factor, budget.image_rule)


def flatten_images(images: Any) -> list[Any]:
    """All images in a nested list, or in an array of images, one after the other."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)) or (hasattr(images, "ndim") and images.ndim > 3):
        return [image for item in images for image in flatten_images(item)]
    return [images]


__all__ = ["KeyeImageProcessor"]

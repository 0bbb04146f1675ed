"""Images to patches: sizes, order, colours, and saving."""

import base64

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from modeling_keye.image_processing_keye import KeyeImageProcessor


def gradient(height: int = 60, width: int = 90) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 4 % 256, columns * 2 % 256, (rows + columns) % 256], -1).astype(np.uint8)


@pytest.fixture
def image_processor() -> KeyeImageProcessor:
    return KeyeImageProcessor()


def test_shapes_and_names(image_processor):
    out = image_processor([gradient(), gradient(28, 200)], return_tensors="pt")
    assert image_processor.model_input_names == ["pixel_values", "image_grid_thw"] == list(out)
    assert out["image_grid_thw"].tolist() == [[1, 4, 6], [1, 2, 14]] and out["image_grid_thw"].dtype == torch.int64
    assert out["pixel_values"].shape == (4 * 6 + 2 * 14, 3, 14, 14) and out["pixel_values"].dtype == torch.float32


def test_patches_are_in_raster_order(image_processor):
    frame = gradient(56, 84)
    pixels = image_processor(frame)["pixel_values"]
    scaled = torch.from_numpy(frame).permute(2, 0, 1).float() / 127.5 - 1
    for row in range(4):
        for column in range(6):
            square = scaled[:, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
            torch.testing.assert_close(pixels[row * 6 + column], square)


def test_every_form_of_one_image_gives_the_same(image_processor):
    frame = gradient()
    tensor = torch.from_numpy(frame).permute(2, 0, 1)
    forms = [
        frame,
        tensor,
        Image.fromarray(frame),
        tensor.float() / 255,
        frame.transpose(2, 0, 1),
        [[frame]],
        tensor[None],
    ]
    expected = image_processor(frame)["pixel_values"]
    for form in forms:
        torch.testing.assert_close(image_processor(form)["pixel_values"], expected, rtol=0, atol=0)


def test_paths_and_missing_paths(image_processor, tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "my image.png")
    expected = image_processor(gradient())["pixel_values"]
    place = tmp_path / "my image.png"
    for path in (place, str(place), f"file://{place}", place.as_uri()):
        assert torch.equal(image_processor(path)["pixel_values"], expected)
    with pytest.raises(FileNotFoundError, match="there is no image at"):
        image_processor(str(tmp_path / "nothing.png"))
    with pytest.raises(ValueError, match="the list of images is empty"):
        image_processor([])


def test_images_in_base64(image_processor, tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "image.png")
    text = base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    for source in (text, f"data:image/png;base64,{text}"):
        assert torch.equal(image_processor(source)["pixel_values"], image_processor(gradient())["pixel_values"])
    for wrong in ("A" * 300_000, "AAA"):
        with pytest.raises(UnidentifiedImageError, match="^data:image/png;base64,AAA.* holds no image") as error:
            image_processor(f"data:image/png;base64,{wrong}")
        assert len(str(error.value)) < 300


def test_a_truncated_file_is_named(image_processor, tmp_path):
    path = tmp_path / "cut.jpg"
    Image.fromarray(gradient()).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UnidentifiedImageError, match=r"cut.jpg holds no image that can be read \(.*truncated.*\)"):
        image_processor(str(path))


@pytest.mark.parametrize("name, values", [("grey.png", np.uint16), ("clear.png", np.uint8)])
def test_a_file_gives_what_its_opened_image_gives(name, values, tmp_path):
    clear = np.concatenate([gradient(56, 56), np.zeros((56, 56, 1), np.uint8)], -1)
    Image.fromarray(gradient()[..., 0].astype(np.uint16) * 257 if values is np.uint16 else clear).save(tmp_path / name)
    processor = KeyeImageProcessor(family="keye_vl_preview")
    with Image.open(tmp_path / name) as opened:
        expected = processor(opened)["pixel_values"]
    assert torch.equal(processor(tmp_path / name)["pixel_values"], expected)


@pytest.mark.parametrize("image", [b"..", 3, {"path": "image.png"}])
def test_other_types_are_named(image_processor, image):
    with pytest.raises(ValueError, match=f"a picture of type {type(image).__name__} is not understood; give a path"):
        image_processor(image)


@pytest.mark.parametrize("limit", [{"min_pixels": -1}, {"max_pixels": 0}, {"min_pixels": "784"}])
def test_limits_are_positive(image_processor, limit):
    with pytest.raises(ValueError, match=r"(min|max)_pixels=.* must be a positive number of pixels"):
        image_processor(gradient(), **limit)


def test_grey_and_transparent_images():
    grey = gradient()[..., 0]
    out = KeyeImageProcessor()(grey)["pixel_values"]
    assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(out[:, 0], out[:, 2])
    clear = np.concatenate([gradient(56, 56), np.zeros((56, 56, 1), np.uint8)], -1)
    for image in (clear, Image.fromarray(clear)):
        # The first model saw transparency as white, the later ones drop it.
        white = KeyeImageProcessor(family="keye_vl_preview")(image)["pixel_values"]
        torch.testing.assert_close(white, torch.ones_like(white))
        dropped = KeyeImageProcessor()(image)["pixel_values"]
        assert torch.equal(dropped, KeyeImageProcessor()(clear[..., :3])["pixel_values"])


@pytest.mark.parametrize("family, expected", [("keye_vl_preview", [1, 52, 94]), ("keye_vl_1_5", [1, 78, 138])])
def test_families(family, expected):
    out = KeyeImageProcessor(family=family)(np.zeros((1080, 1920, 3), np.uint8))
    assert out["image_grid_thw"].tolist() == [expected]


def test_limits_from_attributes_and_from_the_call(image_processor):
    frame = gradient(300, 300)
    assert image_processor(frame, max_pixels=57 * 57)["image_grid_thw"].tolist() == [[1, 4, 4]]
    small = KeyeImageProcessor(min_pixels=28 * 28, max_pixels=85 * 85)
    assert small(frame)["image_grid_thw"].tolist() == [[1, 6, 6]]
    assert small(frame, max_pixels=57 * 57)["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert small(gradient(100, 100), family="keye_vl_preview", min_pixels=102400, max_pixels=1003520)[
        "image_grid_thw"
    ].tolist() == [[1, 24, 24]]
    for height, width in ((300, 300), (20, 100), (1080, 1920)):
        out = image_processor(np.zeros((height, width, 3), np.uint8))
        assert image_processor.get_number_of_image_patches(height, width) == len(out["pixel_values"])


def test_steps_can_be_left_out(image_processor):
    frame = gradient(56, 84)
    plain = image_processor(frame, do_rescale=False, do_normalize=False)["pixel_values"]
    assert plain.max() > 100
    scaled = image_processor(frame, do_normalize=False)["pixel_values"]
    torch.testing.assert_close(scaled, plain / 255)
    floats = torch.from_numpy(frame).permute(2, 0, 1).float() / 255
    torch.testing.assert_close(image_processor(floats, do_rescale=False, do_normalize=False)["pixel_values"], scaled)
    with pytest.raises(ValueError, match="multiples of 28, got 60 x 90"):
        image_processor(gradient(), do_resize=False)


def test_save_and_load(tmp_path):
    before = KeyeImageProcessor(family="keye_vl_1_5", max_pixels=100 * 784)
    before.save_pretrained(tmp_path)
    after = KeyeImageProcessor.from_pretrained(tmp_path)
    assert after.to_dict() == before.to_dict() and after.family == "keye_vl_1_5" and after.max_pixels == 78400
    assert KeyeImageProcessor().max_pixels is None
    assert KeyeImageProcessor.from_dict(before.to_dict(), max_pixels=784 * 8).max_pixels == 6272

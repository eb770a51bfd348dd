"""The plugin of Datasette, by Datasette's own client."""

import asyncio
import base64
import io
import re

import numpy as np
import pytest
from archive_kit import archive_2022, execute, fill, new_image
from PIL import Image
from tiny import CODEBOOK_SIZE, GRID, IMAGE_SIZE

from dm_generations import Archive, Decoder
from dm_generations.models.loading import load_checkpoint

datasette = pytest.importorskip("datasette.app")
pytestmark = pytest.mark.e2e

SOURCE = re.compile(r'<img src="data:image/png;base64,([^"]+)" alt="image (\d+)"')


@pytest.fixture(autouse=True)
def plugin():
    """Registered, as its entry point does where the package is installed."""
    from datasette.plugins import pm

    from dm_generations.api import datasette_plugin

    if is_new := not pm.is_registered(datasette_plugin):
        pm.register(datasette_plugin)
    yield
    if is_new:
        pm.unregister(datasette_plugin)


def get(path, address, codec=None) -> str:
    metadata = {"plugins": {"dm_generations": {"codec": str(codec)}}} if codec else {}

    async def fetch():
        app = datasette.Datasette([str(path)], metadata=metadata)
        response = await app.client.get(f"/{path.stem}/{address}")
        for database in app.databases.values():
            database.close()
        app.executor.shutdown()
        return response

    response = asyncio.run(fetch())
    assert response.status_code == 200, response.text
    return response.text


def shown(page: str) -> dict[int, np.ndarray]:
    """Images on a page by their id."""
    return {
        int(row_id): np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data, row_id in SOURCE.findall(page)
    }


@pytest.fixture
def archive(models, tmp_path):
    """Four images of the tiny codec; another one of another codec."""
    tokens = np.random.default_rng(0).integers(0, CODEBOOK_SIZE, (4, GRID**2), np.uint16)
    checkpoint = load_checkpoint(models.vqgan, "codec")
    path = tmp_path / "a.db"
    with Archive.create(path) as archive:
        fill(archive, new_image(99, quantvec=bytes(8)))
        with archive.transaction():
            codec = archive.model_id(checkpoint.model_info(GRID))
            images = [new_image(i, quantvec=row.tobytes()) for i, row in enumerate(tokens)]
            archive.add_images(images, None, codec, None, 1)
    return path, tokens


def test_tokens_are_shown_as_their_images(models, archive):
    path, tokens = archive
    found = shown(get(path, "images", models.vqgan))
    assert sorted(found) == [2, 3, 4, 5], "the first is of another codec"
    np.testing.assert_array_equal(np.stack([found[i] for i in sorted(found)]), Decoder.load(models.vqgan)(tokens))
    assert found[2].shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert sorted(shown(get(path, "images/3", models.vqgan))) == [3]
    assert sorted(shown(get(path, "images?_col=quantvec", models.vqgan))) == [2, 3, 4, 5]


def test_other_values_are_left_alone(models, archive):
    path, _ = archive
    assert not shown(get(path, "images")), "the codec is not at hand"
    assert not shown(get(path, "prompts", models.vqgan)) and not shown(get(path, "models", models.vqgan))


def test_an_archive_of_2022_is_shown_where_the_grid_is_that_of_the_codec(models, tmp_path):
    path = archive_2022(tmp_path / "b.db")
    values = [bytes(2 * GRID**2), b"", b"123", b"\xff" * 2 * GRID**2, "text", None, 7, bytes(2 * 70**2)]
    for row_id, value in enumerate(values):
        execute(path, "INSERT INTO images VALUES (?, 3, 1, 50, 1.0, 1.0, 3.0, 0, ?, ?, NULL, NULL, NULL)",
                row_id + 1, row_id, value)  # fmt: skip
    assert sorted(shown(get(path, "images", models.vqgan))) == [1]
    assert not shown(get(path, "images", tmp_path / "no-such-codec"))

"""An archive of the tiny models, and the server's application with a client that has opened the page."""

import contextlib
import shutil

import numpy as np
import pytest
from starlette.testclient import TestClient
from tiny import CODEBOOK_SIZE, GRID

from dm_generations.archive import Archive, ModelInfo, NewImage
from dm_generations.inference.decoder import Decoder
from dm_generations.models.loading import load_checkpoint
from dm_generations.sampling.params import SamplingParams
from dm_generations.server.app import TOKEN_META, PageServer
from dm_generations.server.archives import ServedArchives
from dm_generations.server.data import ServedArchive
from dm_generations.server.images import ImageCache, ImageService

TOKEN = "secret-token"
PORT = 8765
PAGE = f"<html><head>{TOKEN_META}</head>the page {TOKEN_META}</html>"
GENERATOR = ModelInfo("generator", "embedded/tiny", "a" * 64, {})
OTHER_GENERATOR = ModelInfo("generator", "<b>big</b>", "d" * 64, {})
PROMPTS = ("a red cube", 'a "blue" <ball>')


def tokens_of(number: int) -> bytes:
    return np.random.default_rng(number).integers(CODEBOOK_SIZE, size=GRID**2, dtype=np.uint16).astype("<u2").tobytes()


def new_images(prompt: str, keys, first_token: int = 0, **settings):
    """Images whose score falls with their key."""
    for key in keys:
        params = SamplingParams(**{"top_k": 5, "temperature": 1.0, **settings})
        yield NewImage(
            prompt, None, params, 7, key, tokens_of(first_token + key), 1.0, 2.0 + key, 20.0 - key, 20.0, 3.0
        )


def add(archive: Archive, codec: ModelInfo, images, generator: ModelInfo | None = GENERATOR) -> None:
    with archive.transaction():
        generator_id = None if generator is None else archive.model_id(generator)
        archive.add_images(images, generator_id, archive.model_id(codec), None, 1)


@pytest.fixture(scope="session")
def codec(models):
    return load_checkpoint(models.vqgan, "codec")


@pytest.fixture(scope="session")
def archive_file(tmp_path_factory, codec):
    """Prompt 1: 4 images of two settings each, prompt 2: 2 images of one setting by two models each."""
    with Archive.create(tmp_path_factory.mktemp("served") / "a.db") as archive:
        info = codec.model_info()
        add(archive, info, new_images(PROMPTS[0], range(4)))
        add(archive, info, new_images(PROMPTS[0], range(4), 100, top_k=9))
        add(archive, info, new_images(PROMPTS[1], range(2), 200))
        add(archive, info, new_images(PROMPTS[1], range(2), 300), OTHER_GENERATOR)
    return archive.path


@pytest.fixture
def path(tmp_path, archive_file):
    """A copy of that archive."""
    return shutil.copy(archive_file, tmp_path / "a.db")


@pytest.fixture(scope="session")
def decoders():
    """Decoders by their arguments, so that each is compiled once."""
    return {}


@contextlib.contextmanager
def sharing(decoders):
    """Within the block, decoders are taken from these, and added to them."""
    make = Decoder.from_checkpoint

    def from_checkpoint(checkpoint, *arguments, **options):
        key = (*arguments, *sorted(options.items()))
        if key not in decoders:
            decoders[key] = make(checkpoint, *arguments, **options)
        return decoders[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "from_checkpoint", from_checkpoint)
        yield patch


@contextlib.contextmanager
def serving(path, codec, decoders, cache_home=None, host=None, has_cookie=True):
    """A client of a server of its own, which has opened the page; `path` is an archive or a list of several."""
    with sharing(decoders) as patch:
        if cache_home is not None:
            patch.setenv("XDG_CACHE_HOME", str(cache_home))
        is_one = not isinstance(path, list)
        archive = ServedArchive(path, codec) if is_one else ServedArchives([ServedArchive(one, codec) for one in path])
        images = ImageService(codec, lambda md5s: archive.call(archive.load_tokens, md5s), ImageCache(codec.sha256))
        server = PageServer(archive, images, PAGE, TOKEN, needs_token=host is not None)
        with TestClient(server.make_app(host), f"http://127.0.0.1:{PORT}", follow_redirects=False) as client:
            client.images = images
            if has_cookie:
                assert client.get("/", params={"token": TOKEN}).status_code == 303
            yield client


@pytest.fixture
def make_client(path, codec, tmp_path, decoders):
    with contextlib.ExitStack() as stack:

        def make(path=path, **options) -> TestClient:
            return stack.enter_context(serving(path, codec, decoders, tmp_path / "cache", **options))

        yield make


@pytest.fixture
def client(make_client):
    return make_client()


@pytest.fixture(scope="module")
def reader(archive_file, codec, decoders):
    """A client that tests share, who change nothing."""
    with serving(archive_file, codec, decoders) as client:
        yield client


@pytest.fixture
def listed(client):
    """The images of the first group, best first, as the page is told of them."""
    group = client.get("/api/groups?prompt=1").json()["groups"][0][0]
    return client.get("/api/images", params={"group": group}).json()["groups"][group]["images"]

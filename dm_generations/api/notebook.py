"""For notebooks: a form that generates images, and the page inside a notebook. IPython and ipywidgets are optional."""

import functools
import html
import http.server
import os
import secrets
import threading
from pathlib import Path
from typing import Any

from dm_generations.api.generator import GeneratedImages, Generator
from dm_generations.api.images import ImageList
from dm_generations.errors import UserError
from dm_generations.inference.scorer import Scorer
from dm_generations.models.base import default_params_of
from dm_generations.pipelines.sweep import DEFAULT_PARAMS

_BATCH_SIZE = 8  # a batch has this size in any case, and a form generates few images


class Demo:
    """A form for a prompt and its settings. It generates images, scores them with CLIP and shows the best ones.

    Where ipywidgets is installed, a notebook shows the form, and its button generates. Elsewhere it shows the images of
    the first values, and `generate` takes others.

    >>> demo = Demo(n=4, best=1)
    >>> demo.generate(prompt="a strawberry")
    <1 image of 'a strawberry' by embedded/dalle_bart>

    Attributes:
        values: What to generate, by the names of the arguments of `generate`.
        results: The images that are shown; None before there are any.
        form: A widget of ipywidgets; None where it is not installed.
    """

    def __init__(self, generator: Generator | None = None, scorer: Scorer | None = None, **values: Any):
        """Take models and first values.

        Args:
            generator: None is the one that ships.
            scorer: None is the CLIP that ships.
            values: See `generate`.

        Raises:
            UserError: There is no such value.
        """
        self._generator = generator or Generator.load(batch_size=_BATCH_SIZE)
        self._scorer = scorer or Scorer.load()
        params = default_params_of(self._generator.models.generator.config) or DEFAULT_PARAMS
        self.values: dict[str, Any] = {
            **{"prompt": "a rocket", "n": 8, "best": 4, "seed": 0},
            **{name: getattr(params, name) for name in ("top_k", "top_p", "temperature", "cond_scale")},
        }
        self._set_values(values)
        self.results: GeneratedImages | None = None
        self.form: Any = None
        self._make_form()

    def generate(self, **values: Any) -> GeneratedImages:
        """Generate images, and return and show the best ones.

        Args:
            values: `prompt`; `n`, how many images are generated; `best`, how many of them are shown; `seed`; `top_k`,
                `top_p`, `temperature` and `cond_scale`. What is left out stays as it is.

        Raises:
            UserError: A value is out of range, or there is no such value.
        """
        self._set_values(values)
        used = dict(self.values)
        best = used.pop("best")
        images = self._generator(used.pop("prompt"), **used, scorer=self._scorer, on_unfinished=self._show)
        self.results = images.best(best)
        self._show(self.results)
        return self.results

    def __repr__(self) -> str:
        return f"<Demo of {self._generator!r}>"

    def _ipython_display_(self) -> None:
        from IPython.display import display

        if self.form is not None:
            display(self.form)
        results = self.results or self.generate()
        if self.form is None:
            display(results)

    def _set_values(self, values: dict[str, Any]) -> None:
        for name in values:
            if name not in self.values:
                raise UserError(f"there is no value {name!r:.60}; values are {', '.join(self.values)}")
        self.values.update(values)

    def _make_form(self) -> None:
        """Make the form, if ipywidgets is installed."""
        try:
            import ipywidgets
        except ImportError:
            return
        value = self.values
        self._fields = {
            "prompt": ipywidgets.Text(value["prompt"], description="prompt", continuous_update=False),
            "n": ipywidgets.BoundedIntText(value["n"], min=1, max=256, description="images"),
            "best": ipywidgets.BoundedIntText(value["best"], min=1, max=64, description="show best"),
            "seed": ipywidgets.BoundedIntText(value["seed"], min=0, max=2**31 - 1, description="seed"),
            "top_k": ipywidgets.BoundedIntText(value["top_k"], min=0, max=1 << 16, description="top k"),
            "top_p": ipywidgets.FloatSlider(value["top_p"], min=0.05, max=1, step=0.05, description="top p"),
            "temperature": ipywidgets.FloatSlider(value["temperature"], min=0, max=2, description="temperature"),
            "cond_scale": ipywidgets.FloatSlider(
                value["cond_scale"], min=0, max=20, step=0.5, description="cond scale"
            ),
        }
        self._button = ipywidgets.Button(description="Generate", button_style="primary")
        self._button.on_click(self._when_clicked)
        self._output = ipywidgets.HTML()
        self.form = ipywidgets.VBox([*self._fields.values(), self._button, self._output])

    def _when_clicked(self, button: Any) -> None:
        button.disabled = True
        try:
            self.generate(**{name: field.value for name, field in self._fields.items()})
        except UserError as error:
            self._output.value = f"<p>{html.escape(str(error))}</p>"
        finally:
            button.disabled = False

    def _show(self, images: ImageList) -> None:
        if self.form is not None:
            self._output.value = images._repr_html_()


def show_page(page: str | os.PathLike[str], height: int = 700) -> None:
    """Show the page of a folder of decoded images inside a notebook, also on Colab.

    The folder is served to this computer alone, at an address that others cannot guess, until the notebook's kernel
    ends.

    Args:
        page: `samplebrowser.html` in the folder.
        height: Pixels.

    Raises:
        UserError: There is no such file.
    """
    from IPython.display import IFrame, display

    port, path = serve_page(page)
    try:
        from google.colab import output
    except ImportError:
        display(IFrame(f"http://127.0.0.1:{port}{path}", "100%", height))
    else:
        output.serve_kernel_port_as_iframe(port, path=path, height=str(height))


def serve_page(page: str | os.PathLike[str]) -> tuple[int, str]:
    """Serve the folder of a page on this computer; return the port, and the path of the page with its "/".

    Raises:
        UserError: There is no such file.
    """
    file = Path(page).resolve()
    if not file.is_file():
        raise UserError(f"{page}: no such file; Archive.export writes one")
    port, secret = _serve_folder(file.parent)
    return port, f"/{secret}/{file.name}"


@functools.cache
def _serve_folder(folder: Path) -> tuple[int, str]:
    """Serve a folder; return the port, and the secret that the paths of all requests begin with."""
    secret = secrets.token_urlsafe(16)
    handler = functools.partial(_Handler, secret=secret, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1], secret


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Answers requests for the files of a folder, below a secret."""

    def __init__(self, *arguments: Any, secret: str, **options: Any):
        self._secret = secret
        super().__init__(*arguments, **options)

    def send_head(self) -> Any:
        """Answer a request, except for what is outside the folder, and for lists of files."""
        prefix = f"/{self._secret}/"
        is_known = self.path.startswith(prefix)
        self.path = self.path.removeprefix(prefix[:-1])
        path = Path(self.translate_path(self.path)).resolve()
        if not (is_known and path.is_file() and path.is_relative_to(self.directory)):
            self.send_error(404)
            return None
        return super().send_head()

    def log_message(self, *arguments: Any) -> None:
        """Keep quiet."""

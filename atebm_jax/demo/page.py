"""The page: five tabs around one image. What they show is made by `answers`.

Nothing is loaded from elsewhere, and browsers are told to refuse it. Requests wait in
one queue, as one at a time runs on the device.
"""

import io
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image
from starlette.middleware import Middleware

from atebm_jax.data.decoding import to_pillow
from atebm_jax.demo import answers as kinds
from atebm_jax.demo.answers import Answer, Answers
from atebm_jax.errors import UserError

_MOST_WAITING = 100
_LARGEST_UPLOAD = "8mb"
# Files of visitors, and what was made for them, are deleted at the first look after
# an hour.
_KEPT_SECONDS, _SECONDS_BETWEEN_LOOKS = 3600, 300
# Pixels along the side of the ground that a mask is drawn on.
_CANVAS = 384
_POLICY = (
    b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'"
)
_STYLE = Path(__file__).with_name("page.css")
_FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]
_MONO = ["ui-monospace", "Consolas", "monospace"]


def build(answers: Answers) -> gr.Blocks:
    """The page of a model, which `launch` opens."""
    blocks = gr.Blocks(
        title="atebm_jax",
        fill_width=True,
        analytics_enabled=False,
        delete_cache=(_SECONDS_BETWEEN_LOOKS, _KEPT_SECONDS),
    )
    size = " x ".join(map(str, answers.model.image_shape))
    with blocks:
        gr.Markdown(
            "# One network that classifies, resists attacks and generates images\n\n"
            f"{answers.workdir}: {len(answers.names)} classes, images of {size}",
            elem_id="title",
        )
        # The image in hand; each visitor has an own one.
        hand = gr.State(answers.examples[0])
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                shown = _picker(answers, hand)
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                _sample_tab(answers, hand)
                _explain_tab(answers, hand)
                canvas = _edit_tab(answers, hand)
                _attack_tab(answers, hand)
                _energy_tab(answers, hand)

        def show(image: np.ndarray) -> list[Any]:
            return [_shown(image), answers.predicted(image), _ground(image)]

        _on(
            [blocks.load, hand.change],
            show,
            show_progress="hidden",
            inputs=hand,
            outputs=[*shown, canvas],
        )
    blocks.queue(max_size=_MOST_WAITING)
    return blocks


def launch(
    answers: Answers,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    **options: Any,
) -> gr.Blocks:
    """Opens the page.

    Args:
      host: address to listen at; the default is reached from this machine alone.
      port: default the first free one from 7860 on.
      share: a public address by Gradio's servers, which then carry all traffic.
      options: more of `gradio.Blocks.launch`.

    Raises:
      UserError: the address cannot be listened at.
    """
    blocks = build(answers)
    theme = gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", font=_FONTS, font_mono=_MONO
    )
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            max_file_size=_LARGEST_UPLOAD,
            theme=theme,
            css=_STYLE.read_text(),
            footer_links=["settings"],
            ssr_mode=False,
            show_error=True,
            app_kwargs={"middleware": [Middleware(_from_here_alone)]},
            **options,
        )
    except OSError as error:
        raise UserError(
            f"--host={host} --port={port}: nothing can be opened there ({error}); give "
            "another port."
        ) from error
    return blocks


def _from_here_alone(app: Callable) -> Callable:
    """Tells browsers to load nothing from other servers."""

    async def answer(scope: Any, receive: Callable, send: Callable) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _POLICY)
                message = message | {"headers": [*message["headers"], policy]}
            await send(message)

        await app(scope, receive, with_policy)

    return answer


def _on(
    triggers: Sequence[Any],
    fn: Callable,
    show_progress: Any = "minimal",
    **options: Any,
) -> None:
    """An event that uses the device; of a slider's moves, the last one counts."""
    gr.on(
        triggers,
        _told(fn),
        concurrency_id="device",
        concurrency_limit=1,
        trigger_mode="always_last",
        show_progress=show_progress,
        api_visibility="private",
        **options,
    )


def _told(function: Callable) -> Callable:
    """Says mistakes in a sentence; what yields answers goes on yielding them."""

    # Gradio gives the place of a click to a function whose signature asks for it.
    @wraps(function)
    def call(*values: Any) -> Iterator[Any]:
        try:
            made = function(*values)
            yield from made if isinstance(made, Iterator) else [made]
        except UserError as error:
            raise gr.Error(str(error), title="", print_exception=False) from error

    return call


def _picker(answers: Answers, hand: gr.State) -> list[Any]:
    """Where the image in hand is chosen; returns what shows it and its classes."""
    image = _picture("Image in hand")
    classes = gr.Label(label="Predicted class", num_top_classes=3)
    upload = gr.UploadButton("Upload an image", size="md", variant="secondary")
    examples = gr.Gallery(
        [(_shown(x), y) for x, y in zip(answers.examples, answers.captions)],
        label="Examples",
        columns=4,
        height=300,
        interactive=False,
        allow_preview=False,
        format="png",
        buttons=[],
        elem_classes="pixels",
    )

    def pick(event: gr.SelectData) -> np.ndarray:
        return answers.examples[event.index]

    examples.select(pick, None, hand, show_progress="hidden", api_visibility="private")
    _on([upload.upload], answers.read, inputs=upload, outputs=hand)
    return [image, classes]


def _sample_tab(answers: Answers, hand: gr.State) -> None:
    samples = answers.config.evaluate.samples
    choices = [("one of each class", -1), *_classes(answers)]
    with gr.Tab("Sample"):
        gr.Markdown(
            "From noise to images: every step lowers the energy E(x, class). Click a "
            "sample to take it in hand."
        )
        with gr.Row():
            label = gr.Dropdown(choices, value=-1, label="Class")
            count = gr.Slider(1, kinds.MOST_IMAGES, 16, step=1, label="Images")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        with gr.Row():
            default = min(int(samples.num_steps), kinds.MOST_STEPS)
            steps = gr.Slider(0, kinds.MOST_STEPS, default, step=1, label="Steps")
            size = gr.Number(float(samples.step_size), label="Step size", minimum=1e-6)
            sampler = gr.Dropdown(list(kinds.SAMPLERS), value="pgd", label="Sampler")
        run = gr.Button("Draw samples", variant="primary")

        def ask(label: int, *rest: Any) -> Iterator[Answer]:
            return answers.sample(None if label < 0 else label, *rest)

        inputs = [label, count, seed, steps, size, sampler]
        drawn = _answered(ask, inputs, [run.click], gallery=True)

        def take(samples: Any, event: gr.SelectData) -> np.ndarray:
            paths = [path for path, _ in samples or []][event.index :]
            if not paths or not Path(paths[0]).is_file():
                raise UserError("this sample is not kept any more: draw samples again.")
            return answers.read(paths[0])

        options: dict[str, Any] = {"api_visibility": "private"}
        drawn.select(_told(take), drawn, hand, show_progress="hidden", **options)
        sampler.change(answers.step_size, sampler, size, queue=False, **options)


def _explain_tab(answers: Answers, hand: gr.State) -> None:
    with gr.Tab("Explain"):
        gr.Markdown("What would this image look like as another class, nearby?")
        with gr.Row():
            target = gr.Dropdown(_classes(answers), value=0, label="Target class")
            radius = _slider(kinds.RADII, 2.0, "Radius (L2)")
            steps = _edit_steps(answers)
        run = gr.Button("Explain", variant="primary")
        _answered(
            partial(answers.edit, "explain"),
            [hand, target, steps, radius],
            [run.click, radius.change, target.input],
            images=("original", "result", "difference"),
            classes=("before", "after"),
            figure=True,
        )


def _edit_tab(answers: Answers, hand: gr.State) -> gr.ImageMask:
    choices: list[tuple[str, str | int | float]] = [
        ("any class", kinds.ANY),
        ("its predicted class", kinds.GUESS),
        *_classes(answers),
    ]
    shown: dict[str, Any] = {"classes": ("before", "after"), "figure": True}
    with gr.Tab("Edit"), gr.Tabs():
        with gr.Tab("Inpaint"):
            gr.Markdown("Draw over what is to be painted anew; the rest stays.")
            canvas = gr.ImageMask(
                label="Draw a mask",
                sources=[],
                transforms=[],
                layers=False,
                canvas_size=(_CANVAS, _CANVAS),
                format="png",
                brush=gr.Brush(48, ["#ff3b6b"], color_mode="fixed"),
                height=_CANVAS + 80,
                buttons=[],
            )
            with gr.Row():
                label = gr.Dropdown(choices, value=kinds.ANY, label="Class")
                steps = _edit_steps(answers)
            run = gr.Button("Inpaint", variant="primary")

            def inpaint(
                image: np.ndarray, drawn: Any, label: Any, steps: Any
            ) -> Answer:
                hole = _hole(drawn, image.shape)
                return answers.edit("inpaint", image, label, steps, hole=hole)

            images = ("original", "start", "result", "difference")
            inputs = [hand, canvas, label, steps]
            _answered(inpaint, inputs, [run.click], images=images, **shown)
        with gr.Tab("Denoise"):
            gr.Markdown("Noise is added to the image, and the energy takes it away.")
            with gr.Row():
                label = gr.Dropdown(choices, value=kinds.ANY, label="Class")
                sigma = gr.Slider(0.01, 1, 0.1, step=0.01, label="Noise (std)")
                strength = _slider(kinds.STRENGTHS, 0.5, "Strength")
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                steps = _edit_steps(answers)
            run = gr.Button("Denoise", variant="primary")
            _answered(
                partial(answers.edit, "denoise"),
                [hand, label, steps, strength, sigma, seed],
                [run.click, strength.change],
                images=("before noise", "start", "result", "difference"),
                **shown,
            )
    return canvas


def _attack_tab(answers: Answers, hand: gr.State) -> None:
    most = answers.most_attack
    which = [""] if answers.plain is None else ["", " (plain)"]
    with gr.Tab("Attack"):
        gr.Markdown(
            "Changes the image within a radius, away from the class that the network "
            "predicts. A plainly trained network gives way to changes that nobody sees."
        )
        radius = gr.Slider(0, most, most / 4, step=most / 40, label="Radius")
        run = gr.Button("Attack", variant="primary")
        _answered(
            answers.attack,
            [hand, radius],
            [run.click, radius.change],
            images=[f"{x}{y}" for y in which for x in ("attacked", "difference")],
            classes=[f"{x}{y}" for y in which for x in ("before", "after")],
        )


def _energy_tab(answers: Answers, hand: gr.State) -> None:
    with gr.Tab("Energy") as tab:
        gr.Markdown("Where this image lies among test images, noise and samples.")
        run = gr.Button("Where does it lie?", variant="primary")
        _answered(answers.energy, [hand], [run.click, tab.select], figure=True)


def _answered(
    ask: Callable,
    inputs: Sequence[Any],
    triggers: Sequence[Any],
    *,
    gallery: bool = False,
    images: Sequence[str] = (),
    classes: Sequence[str] = (),
    figure: bool = False,
) -> gr.Gallery:
    """Places for an answer, which triggers fill; returns the gallery."""
    says = gr.Markdown()
    drawn = gr.Gallery(
        label="Samples",
        columns=8,
        height="auto",
        format="png",
        interactive=False,
        allow_preview=False,
        visible=gallery,
        buttons=[],
        elem_classes="pixels",
    )
    with gr.Row():
        shown = [_picture(name.capitalize()) for name in images]
    with gr.Row():
        named = [gr.Label(label=c.capitalize(), num_top_classes=3) for c in classes]
        diagram = gr.Image(
            show_label=False,
            format="png",
            interactive=False,
            visible=figure,
            scale=2,
            min_width=320,
            buttons=["download", "fullscreen"],
        )
    with gr.Accordion("Make it again", open=False):
        code = gr.Code(language="shell", interactive=False, show_label=False, lines=2)
        file = gr.DownloadButton("Download images and settings", size="md")

    def fill(*values: Any) -> Iterator[list[Any]]:
        made = ask(*values)
        for answer in made if isinstance(made, Iterator) else [made]:
            parts = [answer.says, _captioned(answer) if gallery else None]
            parts += [_shown(answer.images[name]) for name in images]
            parts += [answer.classes[name] for name in classes]
            parts += [_opened(answer.figure), answer.settings["again"]]
            yield [*parts, None]
        with tempfile.TemporaryDirectory() as folder:
            # Gradio copies it before it asks for more.
            path = Path(folder) / "answer.zip"
            path.write_bytes(answer.archive())
            # All else is shown already.
            yield [*[gr.skip()] * len(parts), str(path)]

    outputs = [says, drawn, *shown, *named, diagram, code, file]
    _on(triggers, fill, inputs=list(inputs), outputs=outputs)
    return drawn


def _picture(label: str) -> gr.Image:
    return gr.Image(
        label=label,
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_classes="pixels",
        min_width=150,
    )


def _slider(places: np.ndarray, value: float, label: str) -> gr.Slider:
    step = float(places[1] - places[0])
    return gr.Slider(float(places[0]), float(places[-1]), value, step=step, label=label)


def _edit_steps(answers: Answers) -> gr.Slider:
    default = min(int(answers.config.evaluate.samples.num_steps), kinds.MOST_EDIT_STEPS)
    return gr.Slider(0, kinds.MOST_EDIT_STEPS, default, step=1, label="Steps")


def _classes(answers: Answers) -> list[tuple[str, int]]:
    return [(name, place) for place, name in enumerate(answers.names)]


def _captioned(answer: Answer) -> list[tuple[Image.Image, str]]:
    pictures = map(_shown, answer.images.values())
    return list(zip(pictures, answer.captions, strict=True))


def _shown(image: np.ndarray) -> Image.Image:
    return _own(to_pillow(image))


def _own(image: Image.Image) -> Image.Image:
    """The image, with a text of its own in its file.

    Gradio names files by their content and would write a file of the same content
    again, while the browser of this visitor or of another may be loading it.
    """
    image.info["id"] = uuid.uuid4().hex
    return image


def _opened(png: bytes | None) -> Image.Image | None:
    return None if png is None else _own(Image.open(io.BytesIO(png)))


def _ground(image: np.ndarray) -> dict[str, Any]:
    """An image, enlarged to draw a mask on."""
    large = to_pillow(image).convert("RGB")
    ground = _own(large.resize((_CANVAS, _CANVAS), Image.Resampling.NEAREST))
    return {"background": ground, "layers": [], "composite": ground}


def _hole(drawn: Any, shape: tuple[int, ...]) -> np.ndarray:
    """[H, W] bool of what was drawn: pixels of which a quarter is covered."""
    layers = (drawn or {}).get("layers") or []
    if not layers:
        raise UserError("there is no mask: draw over a part of the image first.")
    covered = Image.fromarray(np.max([layer[..., 3] for layer in layers], axis=0))
    small = covered.resize((shape[1], shape[0]), Image.Resampling.BOX)
    return np.asarray(small) > 64

"""The page itself, in Gradio. It loads nothing from a network, and sends nothing to one."""
import dataclasses
import html
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from .choices import Choice
from .engine import Boxes, Engine, Photo, Run, Segments, explain
from .samples import write_samples
from .understand import VIEWS, look

__all__ = ['build_app', 'serve']

logger = logging.getLogger('visionssm')

UNDERSTAND = 'Understand'
PROGRESS = gr.Progress(track_tqdm=True)
TASKS = {'Classify': 'classification', 'Detect': 'detection', 'Segment': 'segmentation', 'Restore': 'restoration'}
SHOWABLE = ('PNG', 'JPEG', 'MPO', 'WEBP', 'GIF', 'BMP')
QUICK: dict[str, Any] = dict(show_progress='hidden', api_visibility='private')
# on a phone the result is below all that is set
TO_RESULT = """() => {
    const show = () => document.getElementById('status').scrollIntoView({behavior: 'smooth'});
    if (innerWidth < 768) setTimeout(show, 500);
}"""
EMPTY = '<p class="hint">Choose a picture, a task and a model, and press Run. The result appears here.</p>'
ABOUT = ('# visionssm\nTry the models on pictures of your own. Everything is computed on this machine, and pictures do '
         'not leave it.')
CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
#head h1 { margin: 0; font-size: 1.6rem; } #head p { margin: 0.2rem 0 0; color: var(--body-text-color-subdued); }
#status { min-height: 3.5rem; }
#status p { margin: 0.3rem 0; } #status .hint, #about p { color: var(--body-text-color-subdued); }
.problem { border-left: 4px solid #c62828; background: color-mix(in srgb, #c62828 10%, transparent);
           padding: 0.6rem 0.8rem; border-radius: 4px; overflow-wrap: anywhere; white-space: pre-line; }
.took { font-variant-numeric: tabular-nums; color: var(--body-text-color-subdued); }
#model input { text-overflow: ellipsis; margin-right: 1.2rem; }
#card { font-size: 0.9rem; overflow-wrap: anywhere; }
.found { border-collapse: collapse; width: 100%; } .found th { text-align: left; font-weight: 600; }
.found th, .found td { padding: 0.25rem 0.6rem 0.25rem 0; border-bottom: 1px solid var(--border-color-primary); }
.found td.number { text-align: right; font-variant-numeric: tabular-nums; }
.swatch { display: inline-block; width: 0.9em; height: 0.9em; margin-right: 0.5em; border-radius: 2px;
          border: 1px solid var(--border-color-primary); vertical-align: -0.1em; }
"""


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What the user sets."""
    photo: gr.Image
    original: gr.State
    about: gr.Markdown
    samples: gr.Dataset
    task: gr.Radio
    model: gr.Dropdown
    card: gr.Markdown
    score: gr.Slider
    run: gr.Button
    stop: gr.Button


@dataclasses.dataclass(frozen=True)
class _Views:
    """What the user sets to look into a model."""
    view: gr.Radio
    block: gr.Number
    across: gr.Slider
    down: gr.Slider
    noise: gr.Checkbox


@dataclasses.dataclass(frozen=True)
class _Results:
    """What the page shows."""
    status: gr.HTML
    classes: gr.Label
    picture: gr.Image
    slider: gr.ImageSlider
    table: gr.HTML
    download: gr.DownloadButton

    def hidden(self) -> dict[Any, Any]:
        """Return updates that show nothing."""
        return {part: gr.update(visible=False) for part in (self.classes, self.picture, self.slider, self.table,
                                                            self.download)}


class _Page:
    """What the events do.

    Args:
        engine: Reads pictures and runs models.
        choices: The models.
        samples: Caption to file.
    """

    def __init__(self, engine: Engine, choices: Sequence[Choice], samples: Mapping[str, Path]) -> None:
        self.engine = engine
        self.choices = {choice.key: choice for choice in choices}
        self.samples = samples

    def offered(self, task: str) -> list[tuple[str, str]]:
        """Return labels and keys of the models for a task, those that need no download first."""
        if task == UNDERSTAND:
            found = [choice for choice in self.choices.values() if choice.analysable]
        else:
            found = [choice for choice in self.choices.values()
                     if choice.task == TASKS[task] and choice.source != 'random']
        order = sorted(found, key=lambda choice: (not choice.is_here, choice.source == 'random'))
        return [(choice.label, choice.key) for choice in order]

    def first_task(self) -> str:
        """Return the first task that has a model whose weights are here, else the one that needs none."""
        ready = {choice.task for choice in self.choices.values() if choice.source != 'random' and choice.is_here}
        return next((task for task in TASKS if TASKS[task] in ready), UNDERSTAND)

    def card(self, key: str | None) -> str:
        """Return the line about a model."""
        if key is None:
            return 'There is no model for this task: give weights by `visionssm demo --checkpoint FILE`.'
        try:
            return self.choices[key].card()
        except (ImportError, RuntimeError, ValueError) as error:  # one model must not take the page with it
            logger.warning('%s cannot be described: %s', key, error)
            return f'**{self.choices[key].title}**'

    def read(self, payload: Mapping[str, Any] | None, original: tuple[str, str, str] | None) -> Photo | None:
        """Read the picture that a session shows.

        Args:
            payload: What the browser shows.
            original: Name of a preview, and path and name of the file that it stands for.
        """
        if payload is None:
            return None
        path, name = payload['path'], payload.get('orig_name') or 'picture'
        if original is not None and Path(path).name == original[0]:
            _, path, name = original
        return self.engine.read(path, name)

    def run(self, task: str, key: str | None, photo: Photo | None, score: float, report: Callable[[int, int], None],
            view: Mapping[str, Any], results: _Results) -> dict[Any, Any]:
        """Run a task and return the updates of the results."""
        choice = self.choices.get(key or '')
        if choice is None:
            raise ValueError('There is no model for this task: give weights by visionssm demo --checkpoint FILE')
        if task == UNDERSTAND:
            details = dict(view)
            given = None if details.pop('noise') and view['view'] == VIEWS[0] else photo
            drawn = look(self.engine, choice, photo=given, progress=report, **details)
            return {results.status: _paragraph(drawn.note),
                    results.picture: gr.update(value=drawn.picture, visible=True, label=view['view'])}
        if photo is None:
            raise ValueError('There is no picture: none was dropped yet, or the last one could not be taken. Drop '
                             'one, or take one of those below')
        if task == 'Classify':
            found = self.engine.classify(photo, choice)
            return {results.status: _took(choice, found.run),
                    results.classes: gr.update(value=_distinct(found.names, found.probabilities), visible=True)}
        if task == 'Detect':
            boxes = self.engine.detect(photo, choice, score)
            return {results.status: _took(choice, boxes.run),
                    results.table: gr.update(value=_boxes(boxes), visible=True),
                    results.picture: gr.update(value=boxes.picture, visible=True, label='Objects')}
        if task == 'Segment':
            parts = self.engine.segment(photo, choice)
            return {results.status: _took(choice, parts.run),
                    results.table: gr.update(value=_segments(parts), visible=True),
                    results.picture: gr.update(value=parts.picture, visible=True, label='Classes')}
        restored = self.engine.restore(photo, choice, report)
        return {results.status: _took(choice, restored.run, restored.note),
                results.slider: gr.update(value=(restored.before, restored.after), visible=True),
                results.download: gr.update(value=str(restored.file), visible=True)}


def _paragraph(text: str) -> str:
    return f'<p class="took">{html.escape(text)}</p>'


def _problem(text: str) -> str:
    return f'<div class="problem" role="alert">{html.escape(text)}</div>'


def _took(choice: Choice, run: Run, note: str = '') -> str:
    parts = [choice.title, f'{1000 * run.seconds:.0f} ms' if run.seconds < 1 else f'{run.seconds:.1f} s', run.device]
    parts += [f'loaded in {run.loading:.1f} s'] if run.loading else []
    return _paragraph(' · '.join([*parts, *([note] if note else [])]))


def _distinct(names: Sequence[str], probabilities: Sequence[float]) -> dict[str, float]:
    """Pair classes with probabilities; a name that two classes share is numbered."""
    found: dict[str, float] = {}
    for name, probability in zip(names, probabilities, strict=True):
        number = 1 + sum(known == name or known.startswith(f'{name} (') for known in found)
        found[name if number == 1 else f'{name} ({number})'] = probability
    return found


def _swatch(color: Sequence[int], name: str) -> str:
    return f'<span class="swatch" style="background: rgb{tuple(color)}"></span>{html.escape(name)}'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], nothing: str) -> str:
    if not rows:
        return f'<p class="hint">{nothing}</p>'
    body = ''.join(f'<tr><td>{row[0]}</td>' + ''.join(f'<td class="number">{cell}</td>' for cell in row[1:]) + '</tr>'
                   for row in rows)
    return f'<table class="found"><tr>{"".join(f"<th>{cell}</th>" for cell in head)}</tr>{body}</table>'


def _boxes(found: Boxes) -> str:
    rows = [(_swatch(row['color'], row['category']), f'{row["score"]:.2f}', ' '.join(f'{side:.0f}' for side in
                                                                                     row['bbox']))
            for row in found.objects]
    return _table(('object', 'score', 'x, y, width, height'), rows, 'No object reaches the lowest score.')


def _segments(found: Segments) -> str:
    rows = [(_swatch(color, name), f'{share:.1f} %') for name, share, color in found.shares]
    return _table(('class', 'share'), rows, 'Nothing was found.')


def _lay_out_task(page: _Page) -> gr.Radio:
    return gr.Radio([*TASKS, UNDERSTAND], value=page.first_task(), label='Task', elem_id='task')


def _lay_out_inputs(page: _Page, task: gr.Radio) -> _Inputs:
    models = page.offered(task.value)
    key = models[0][1] if models else None
    photo = gr.Image(label='Picture', sources=['upload', 'clipboard', 'webcam'], type='filepath', image_mode=None,
                     height=280, buttons=['fullscreen'], elem_id='photo')
    about = gr.Markdown('', elem_id='about')
    samples = gr.Dataset(label='Pictures to begin with', components=[gr.Image(visible=False, type='filepath')],
                         samples=[[str(path)] for path in page.samples.values()], type='index', elem_id='samples',
                         sample_labels=list(page.samples), visible=bool(page.samples))
    model = gr.Dropdown(models, value=key, label='Model', info='Type to search.', elem_id='model')
    card = gr.Markdown(page.card(key), elem_id='card')
    score = gr.Slider(0.05, 0.95, 0.3, step=0.05, label='Lowest score', visible=task.value == 'Detect')
    with gr.Row():
        run = gr.Button('Run', variant='primary', scale=3, min_width=120, elem_id='run')
        stop = gr.Button('Stop', scale=1, min_width=80, elem_id='stop')
    return _Inputs(photo, gr.State(None), about, samples, task, model, card, score, run, stop)


def _lay_out_views(visible: bool) -> _Views:
    view = gr.Radio(VIEWS, value=VIEWS[1], label='View', visible=visible, elem_id='view')
    noise = gr.Checkbox(True, label='Mean over noise, as usual, instead of the picture', visible=False)
    with gr.Row():
        block = gr.Number(0, label='Block', info='Of those that scan, from 0; -1 is the last.', precision=0,
                          visible=visible, elem_id='block', min_width=150)
        across = gr.Slider(0, 100, 50, step=0.5, label='Pixel, from the left (%)', info='Or click on the picture.',
                           visible=False, elem_id='across', min_width=150)
        down = gr.Slider(0, 100, 50, step=0.5, label='Pixel, from the top (%)', info='Or click on the picture.',
                         visible=False, elem_id='down', min_width=150)
    return _Views(view, block, across, down, noise)


def _lay_out_results() -> _Results:
    return _Results(
        status=gr.HTML(EMPTY, elem_id='status'),
        classes=gr.Label(label='Top 5', num_top_classes=5, visible=False, elem_id='classes'),
        picture=gr.Image(label='Result', interactive=False, format='png', visible=False, show_label=False,
                         elem_id='picture', buttons=['download', 'fullscreen']),
        slider=gr.ImageSlider(label='Before and after', interactive=False, format='png', type='pil', visible=False,
                              elem_id='slider', buttons=['fullscreen'], max_height=640),
        table=gr.HTML(visible=False, elem_id='table'),
        download=gr.DownloadButton('Download the result', visible=False, elem_id='download'))


def build_app(engine: Engine, choices: Sequence[Choice]) -> gr.Blocks:
    """Build the page.

    Args:
        engine: Reads pictures and runs models.
        choices: The models to offer.

    Returns:
        The page; `serve` shows it.
    """
    page = _Page(engine, choices, write_samples(engine.folder))
    with gr.Blocks(title='visionssm', analytics_enabled=False, delete_cache=(600, 3600)) as app:
        gr.Markdown(ABOUT, elem_id='head')
        task = _lay_out_task(page)
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                inputs = _lay_out_inputs(page, task)
            with gr.Column(scale=7, min_width=320):
                views = _lay_out_views(task.value == UNDERSTAND)
                results = _lay_out_results()
        _connect_photo(page, inputs, results)
        _connect_choices(page, inputs, views, results)
        _connect_run(page, inputs, views, results)
    return app


def _connect_photo(page: _Page, inputs: _Inputs, results: _Results) -> None:
    def open_photo(payload: Any) -> dict[Any, Any]:
        updates = {inputs.original: None, inputs.about: '', results.status: EMPTY, **results.hidden()}
        try:
            photo = page.read(payload, None)
        except ValueError as error:
            return {**updates, inputs.photo: None, results.status: _problem(explain(error))}
        if photo is None:
            return updates
        updates[inputs.about] = photo.about
        if photo.picture.kind not in SHOWABLE:  # browsers do not show all that can be read
            preview = Path(tempfile.mkstemp('.png', 'preview-', page.engine.folder)[1])
            photo.rgb.save(preview)
            updates.update({inputs.photo: str(preview), inputs.original: (preview.name, payload['path'], photo.name)})
        return updates

    def take_sample(index: int) -> dict[Any, Any]:
        name, path = list(page.samples.items())[index]
        updates = open_photo({'path': str(path), 'orig_name': path.name})
        return {**updates, inputs.photo: str(path), inputs.about: f'{name}: {updates[inputs.about]}'}

    opened = [inputs.original, inputs.photo, inputs.about, results.status, *results.hidden()]
    inputs.photo.input(open_photo, inputs.photo, opened, preprocess=False, **QUICK)
    inputs.photo.clear(lambda: open_photo(None), None, opened, **QUICK)
    inputs.samples.click(take_sample, inputs.samples, opened, **QUICK)


def _connect_choices(page: _Page, inputs: _Inputs, views: _Views, results: _Results) -> None:
    def choose_view(task: str, view: str) -> dict[Any, Any]:
        chosen = view if task == UNDERSTAND else None
        return {views.block: gr.update(visible=chosen in VIEWS[1:]),
                views.noise: gr.update(visible=chosen == VIEWS[0]),
                **{part: gr.update(visible=chosen == VIEWS[2]) for part in (views.across, views.down)}}

    def choose_task(task: str, view: str) -> dict[Any, Any]:
        models = page.offered(task)
        key = models[0][1] if models else None
        return {inputs.model: gr.update(choices=models, value=key), inputs.card: page.card(key),
                inputs.score: gr.update(visible=task == 'Detect'), **choose_view(task, view),
                views.view: gr.update(visible=task == UNDERSTAND), results.status: EMPTY, **results.hidden()}

    options = [views.block, views.noise, views.across, views.down]
    inputs.task.change(choose_task, [inputs.task, views.view], [
        inputs.model, inputs.card, inputs.score, views.view, *options, results.status, *results.hidden()], **QUICK)
    views.view.change(choose_view, [inputs.task, views.view], options, **QUICK)
    inputs.model.input(page.card, inputs.model, inputs.card, **QUICK)


def _connect_run(page: _Page, inputs: _Inputs, views: _Views, results: _Results) -> None:
    def run(payload: Any, original: tuple[str, str, str] | None, task: str, key: str | None, score: float,
            view: str, block: float, across: float, down: float, noise: bool, progress: gr.Progress = PROGRESS) -> Any:
        def report(done: int, total: int) -> None:
            progress((done, total), desc='Running', unit='pieces' if task == 'Restore' else 'images')

        details = {'view': view, 'block': int(block or 0), 'place': (across / 100, down / 100), 'noise': noise}
        try:
            updates = page.run(task, key, page.read(payload, original), score, report, details, results)
        except Exception as error:
            words = explain(error)
            if not words:
                raise
            logger.info('%s: %s', type(error).__name__, error)
            updates = {results.status: _problem(words)}
        # a model that was fetched is here now
        return {inputs.model: gr.update(choices=page.offered(task)), **results.hidden(), **updates}

    def aim(event: gr.SelectData, payload: Any, original: tuple[str, str, str] | None) -> Any:
        photo = page.read(payload, original)
        if photo is None:
            return gr.skip(), gr.skip()
        width, height = photo.rgb.size
        return round(100 * event.index[0] / width, 1), round(100 * event.index[1] / height, 1)

    given = [inputs.photo, inputs.original, inputs.task, inputs.model, inputs.score, views.view, views.block,
             views.across, views.down, views.noise]
    # the picture goes as it was uploaded: what is wrong with it is said by us
    ran = inputs.run.click(run, given, [inputs.model, results.status, *results.hidden()], preprocess=False,
                           show_progress_on=results.status, concurrency_limit=1, concurrency_id='model',
                           api_visibility='private')
    ran.then(None, None, None, js=TO_RESULT, **QUICK)
    inputs.stop.click(page.engine.stop, None, None, queue=False, **QUICK)
    inputs.photo.select(aim, [inputs.photo, inputs.original], [views.across, views.down], preprocess=False, **QUICK)


def serve(app: gr.Blocks, host: str, port: int, max_size: float, browser: bool = False) -> str:
    """Show a page without blocking; `app.close()` ends it.

    Args:
        app: What `build_app` returned.
        host: Address to listen at.
        port: Port to listen at.
        max_size: Most MiB of an uploaded file.
        browser: Open a browser.

    Returns:
        The address of the page.
    """
    # named fonts are of the system: others would be fetched
    theme = gr.themes.Default(primary_hue='blue', neutral_hue='slate', font=['system-ui', 'sans-serif'],
                              font_mono=['ui-monospace', 'monospace'])
    # the usual grey is too faint to read with ease
    theme.set(body_text_color_subdued='*neutral_500', body_text_color_subdued_dark='*neutral_400',
              block_info_text_color='*neutral_500', block_info_text_color_dark='*neutral_400')
    app.queue(max_size=32, api_open=False, default_concurrency_limit=8)
    return app.launch(
        server_name=host, server_port=port, inbrowser=browser, share=False, quiet=True, prevent_thread_lock=True,
        max_file_size=int(max_size * 2 ** 20), allowed_paths=[], footer_links=[], run_history=False, show_error=True,
        enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, theme=theme, css=CSS)[1]

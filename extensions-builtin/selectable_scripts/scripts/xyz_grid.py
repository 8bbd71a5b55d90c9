"""The X/Y/Z plot: a picture for every combination of the values of up to three axes, laid out as grids."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image
from script_jobs import MAX_PICTURES, Part, copy_request, megapixels_of_grid, part_of, together
from xyz_axes import (
    AxisOption,
    AxisOptionImg2Img,
    AxisOptionTxt2Img,
    apply_field,
    apply_override,
    boolean_choice,
    build_axis_options,
    confirm_samplers,
    fix_seeds,
    format_nothing,
    format_remove_path,
    format_value,
    format_value_add_label,
    format_value_join_list,
    read_values,
    str_permutations,
)

from backend import memory_management
from modules import images, scripts
from modules.errors import RequestError
from modules.processing import Processed, StableDiffusionProcessing, fix_seed, process_images
from modules.ui_components import ToolButton

__all__ = [
    "AxisOption",
    "AxisOptionImg2Img",
    "AxisOptionTxt2Img",
    "apply_field",
    "apply_override",
    "axis_options",
    "boolean_choice",
    "confirm_samplers",
    "format_nothing",
    "format_remove_path",
    "format_value",
    "format_value_add_label",
    "format_value_join_list",
    "str_permutations",
]

axis_options: list[AxisOption] = build_axis_options()
"""Everything that can be varied. Extensions append to it."""

QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
_MENTION = re.compile(r"<[^<>]+>")
SHARE_A_JOB = frozenset({"Nothing", "Seed", "Var. seed", "Prompt S/R", "Prompt order"})
"""Axes along which the pictures of one job may differ."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis of the plot: its option, its values, and how much the seed increases from one value to the next."""

    name: str
    option: AxisOption
    values: tuple[Any, ...]
    text: str
    seed_step: int

    def labels(self, p: Any) -> list[str]:
        return [self.option.format_value(p, self.option, value) for value in self.values]


def order_of_cells(axes: Sequence[Axis]) -> list[tuple[int, ...]]:
    """All cells of the grid. Axes that are expensive to change vary slowest; axes whose pictures may share a job vary fastest."""
    by_cost = sorted(range(len(axes)), key=lambda number: (-axes[number].option.cost, axes[number].option.label in SHARE_A_JOB))
    cells = itertools.product(*(range(len(axes[number].values)) for number in by_cost))
    return [tuple(place for _, place in sorted(zip(by_cost, cell))) for cell in cells]


def group_cells(axes: Sequence[Axis], order: Sequence[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    """Yields runs of up to `size` neighbors that differ only in prompts and seeds. Each run becomes one job, whose pictures all slots share."""

    def what_a_job_has(cell: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(place for axis, place in zip(axes, cell) if axis.option.label not in SHARE_A_JOB)

    for _, cells in itertools.groupby(order, what_a_job_has):
        alike = list(cells)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def networks_of(request: StableDiffusionProcessing) -> list[str]:
    """LoRA and other networks that the prompt mentions. A job uses those of its first prompt."""
    return sorted(_MENTION.findall(str(request.prompt)))


def join_requests(requests: Sequence[StableDiffusionProcessing]) -> StableDiffusionProcessing:
    """Joins requests that differ only in prompts and seeds into one job."""
    joined = requests[0]
    for name in ("prompt", "negative_prompt", "seed", "subseed"):
        setattr(joined, name, [getattr(request, name) for request in requests])
    joined.batch_size, joined.do_not_save_grid = len(requests), True
    return joined


class Script(scripts.Script):
    def title(self) -> str:
        return "X/Y/Z plot"

    def ui(self, is_img2img: bool) -> list[Any]:
        self.current_axis_options = [option for option in axis_options if option.is_img2img in (None, is_img2img)]
        with gr.Row(), gr.Column(scale=19):
            rows = [self._axis_row(letter, 1 if letter == "X" else 0) for letter in "XYZ"]
        with gr.Row(elem_id=self.elem_id("axis_options")):
            with gr.Column():
                draw_legend = gr.Checkbox(label="Draw legend", value=True, elem_id=self.elem_id("draw_legend"))
                no_fixed_seeds = gr.Checkbox(label="Keep -1 for seeds", value=False, elem_id=self.elem_id("no_fixed_seeds"))
                with gr.Row():
                    vary = [
                        gr.Checkbox(label=f"Vary seeds for {letter}", value=False, min_width=80, elem_id=self.elem_id(f"vary_seeds_{letter.lower()}"))
                        for letter in "XYZ"
                    ]
            with gr.Column():
                lone = gr.Checkbox(label="Include Sub Images", value=False, elem_id=self.elem_id("include_lone_images"))
                sub_grids = gr.Checkbox(label="Include Sub Grids", value=False, elem_id=self.elem_id("include_sub_grids"))
                csv_mode = gr.Checkbox(label="Use text inputs instead of dropdowns", value=False, elem_id=self.elem_id("csv_mode"))
            margin = gr.Slider(label="Grid margins (px)", minimum=0, maximum=500, value=0, step=2, elem_id=self.elem_id("margin_size"))
        with gr.Row(elem_id="swap_axes"):
            for one, other in (("X", "Y"), ("Y", "Z"), ("X", "Z")):
                button = gr.Button(f"Swap {one}/{other} axes", elem_id=f"{one.lower()}{other.lower()}_grid_swap_axes_button")
                pair = [*rows["XYZ".index(one)][:3], *rows["XYZ".index(other)][:3]]
                button.click(self._swap, inputs=pair, outputs=pair, **QUIET)
        for kind, values, dropdown, fill in rows:
            parts = [kind, values, dropdown, csv_mode]
            fill.click(self._fill, inputs=[kind, csv_mode], outputs=[values, dropdown], **QUIET)
            kind.change(self._select, inputs=parts, outputs=[fill, values, dropdown], **QUIET)
            csv_mode.change(self._select, inputs=parts, outputs=[fill, values, dropdown], **QUIET)
        self.infotext_fields = [
            field
            for letter, (kind, values, dropdown, _) in zip("XYZ", rows)
            for field in ((kind, f"{letter} Type"), (values, f"{letter} Values"), (dropdown, _chosen_from(self, letter)))
        ]
        flat = [control for row in rows for control in row[:3]]
        return [*flat, draw_legend, lone, sub_grids, no_fixed_seeds, *vary, margin, csv_mode]

    def _axis_row(self, letter: str, start: int) -> tuple[Any, Any, Any, Any]:
        labels = [option.label for option in self.current_axis_options]
        low = letter.lower()
        with gr.Row():
            kind = gr.Dropdown(label=f"{letter} type", choices=labels, value=labels[start], type="index", elem_id=self.elem_id(f"{low}_type"))
            values = gr.Textbox(label=f"{letter} values", lines=1, value="", elem_id=self.elem_id(f"{low}_values"))
            dropdown = gr.Dropdown(
                label=f"{letter} values", choices=[], value=[], visible="hidden", multiselect=True, allow_custom_value=True,
                elem_id=self.elem_id(f"{low}_values_dropdown"),
            )  # fmt: skip
            fill = ToolButton(value="📒", elem_id=f"xyz_grid_fill_{low}_tool_button", visible=False)
        return kind, values, dropdown, fill

    # The page

    def _option(self, index: Any) -> AxisOption:
        options: list[AxisOption] = self.current_axis_options
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(options):
            names = ", ".join(f"{number} {option.label}" for number, option in enumerate(options))
            raise RequestError(f"X/Y/Z plot: {index!r} is not an axis. Choose from {names}.")
        return options[index]

    def _select(self, index: int, text: str, chosen: list[str], csv_mode: bool) -> tuple[Any, Any, Any]:
        """Updates an axis's controls after its type, or the way to enter values, has changed."""
        choices = self._option(index or 0).choices
        if choices is None:
            return gr.update(visible=False), gr.update(visible=True), gr.update(visible="hidden")
        known = list(choices())
        if csv_mode:
            return gr.update(visible=True), gr.update(visible=True, value=text or ", ".join(chosen or [])), gr.update(visible="hidden")
        kept = [value for value in chosen or [] if value in known] or [part.strip() for part in (text or "").split(",") if part.strip() in known]
        return gr.update(visible=True), gr.update(visible="hidden"), gr.update(visible=True, choices=known, value=kept)

    def _fill(self, index: int, csv_mode: bool) -> tuple[Any, Any]:
        choices = self._option(index or 0).choices
        known = [] if choices is None else list(choices())
        quoted = ", ".join(f'"{value}"' if "," in value else value for value in known)
        return (gr.update(value=quoted), gr.skip()) if csv_mode else (gr.skip(), gr.update(value=known))

    def _swap(self, *pair: Any) -> list[Any]:
        labels = [option.label for option in self.current_axis_options]
        first, second = pair[:3], pair[3:]
        return [labels[second[0] or 0], *second[1:], labels[first[0] or 0], *first[1:]]

    # The job

    def run(  # type: ignore[override]  # the host hands in the values of `ui`
        self,
        p: StableDiffusionProcessing,
        x_type: int, x_values: str, x_values_dropdown: list[str],
        y_type: int, y_values: str, y_values_dropdown: list[str],
        z_type: int, z_values: str, z_values_dropdown: list[str],
        draw_legend: bool, include_lone_images: bool, include_sub_grids: bool, no_fixed_seeds: bool,
        vary_seeds_x: bool, vary_seeds_y: bool, vary_seeds_z: bool, margin_size: float, csv_mode: bool,
    ) -> Processed:  # fmt: skip
        """Raises RequestError for unknown axes or values and for a grid larger than the settings allow, before anything is made."""
        if not no_fixed_seeds:
            fix_seed(p)
        given = ((x_type, x_values, x_values_dropdown), (y_type, y_values, y_values_dropdown), (z_type, z_values, z_values_dropdown))
        axes = self._read_axes(p, given, (vary_seeds_x, vary_seeds_y, vary_seeds_z), csv_mode=csv_mode, keep_random=no_fixed_seeds)
        margin_px = scripts.checked_value(self, "Grid margins (px)", margin_size)
        _check_grid(p, axes, margin_px)
        cells, parts = self._make_cells(p, axes)
        if not parts:
            raise RequestError("X/Y/Z plot: the job was interrupted before its first picture.")
        comment = _comment_on_size(p, axes, cells, margin_px)
        grids = [] if comment else _draw_grids(p, axes, cells, draw_legend=draw_legend, margin_px=margin_px)
        result = together(p, parts, show_pictures=include_lone_images or not grids)
        result.comments += comment
        text = self._infotext(p, axes, parts[0].pictures[0][1], keep_random=no_fixed_seeds)
        shown = grids if include_sub_grids or len(grids) == 1 else grids[:1]
        result.images[:0], result.infotexts[:0] = shown, [text] * len(shown)
        result.index_of_first_image, result.info = len(shown), text
        if p.options.grid_save:
            for grid in grids:
                images.save_image(
                    grid, p.outpath_grids or "", "xyz_grid", result.seed, result.prompt, p.options.grid_format, info=text, grid=True, p=p
                )
        return result

    def _read_axes(
        self, p: Any, given: Sequence[tuple[Any, str, list[str]]], vary: Sequence[bool], *, csv_mode: bool, keep_random: bool
    ) -> list[Axis]:
        axes: list[Axis] = []
        step = 1
        for letter, (kind, text, chosen), varies in zip("XYZ", given, vary):
            option = self._option(kind)
            chosen = [str(value) for value in chosen] if isinstance(chosen, (list, tuple)) else []
            values = read_values(option, str(text or ""), chosen, csv_mode=csv_mode)
            if not keep_random:
                values = fix_seeds(option, values)
            if option.confirm is not None:
                option.confirm(p, values)
            shown = text if option.choices is None or csv_mode else ", ".join(chosen)
            axes.append(Axis(name=letter, option=option, values=tuple(values), text=shown, seed_step=step if varies else 0))
            step *= len(values) if varies else 1
        return axes

    def _make_cells(self, p: StableDiffusionProcessing, axes: Sequence[Axis]) -> tuple[dict[tuple[int, ...], Image.Image], list[Part]]:
        """The picture of each cell, and the results in grid order."""
        state, order = p.context.state, order_of_cells(axes)
        may_share = p.n_iter == 1 and p.batch_size == 1 and isinstance(p.prompt, str)
        groups = list(group_cells(axes, order, len(memory_management.current_store().slots) if may_share else 1))
        state.job_count = len(groups) * p.n_iter
        pictures: dict[tuple[int, ...], Image.Image] = {}
        parts: dict[tuple[int, ...], Part] = {}
        for cells in groups:
            if state.interrupted or state.stopping_generation:
                break
            requests = [_request_of(p, axes, cell) for cell in cells]
            share = len(cells) > 1 and all(networks_of(request) == networks_of(requests[0]) for request in requests)
            jobs = [(cells, join_requests(requests))] if share else [([cell], request) for cell, request in zip(cells, requests)]
            for made, request in jobs:
                done = process_images(request)
                for place, cell in enumerate(made):
                    parts[cell] = part_of(done, place, 1) if share else part_of(done)
                    if parts[cell].pictures:
                        pictures[cell] = parts[cell].pictures[0][0] if share else done.images[0]
        in_order = sorted(pictures, key=lambda cell: cell[::-1])
        return {cell: pictures[cell] for cell in in_order}, [parts[cell] for cell in in_order]

    def _infotext(self, p: StableDiffusionProcessing, axes: Sequence[Axis], first: str, *, keep_random: bool) -> str:
        """The first cell's parameters plus the axes."""
        one = copy_request(p)
        for axis in axes:
            axis.option.apply(one, axis.values[0], axis.values)
        one.extra_generation_params["Script"] = self.title()
        for axis in axes:
            if axis.option.label != "Nothing":
                one.extra_generation_params[f"{axis.name} Type"] = axis.option.label
                one.extra_generation_params[f"{axis.name} Values"] = axis.text
                if axis.option.label in ("Seed", "Var. seed") and not keep_random:
                    one.extra_generation_params[f"Fixed {axis.name} Values"] = ", ".join(str(value) for value in axis.values)
        more = ", ".join(f"{key}: {_quoted(value)}" for key, value in one.extra_generation_params.items() if key not in p.extra_generation_params)
        return f"{first}, {more}"


def _request_of(p: StableDiffusionProcessing, axes: Sequence[Axis], cell: tuple[int, ...]) -> StableDiffusionProcessing:
    """The request of one cell."""
    one = copy_request(p)
    for axis, place in zip(axes, cell):
        axis.option.apply(one, axis.values[place], axis.values)
    if not isinstance(one.seed, list) and int(one.seed) >= 0:
        one.seed = int(one.seed) + sum(axis.seed_step * place for axis, place in zip(axes, cell))
    return one


def _quoted(value: Any) -> str:
    text = str(value)
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' if re.search(r"[,:\n]", text) else text


def _chosen_from(script: Any, letter: str) -> Any:
    """Reads the values of an axis that is chosen from a list."""

    def read(params: Any) -> Any:
        option = next((one for one in script.current_axis_options if one.label == params.get(f"{letter} Type")), None)
        if option is None or option.choices is None:
            return None
        known = list(option.choices())
        chosen = [part.strip() for part in str(params.get(f"{letter} Values", "")).split(",")]
        return gr.update(choices=known, value=[value for value in chosen if value in known])

    return read


def _check_grid(p: StableDiffusionProcessing, axes: Sequence[Axis], margin_px: int) -> None:
    """Before anything is made. Raises RequestError."""
    pictures = p.n_iter * p.batch_size * math.prod(len(axis.values) for axis in axes)
    if pictures > MAX_PICTURES:
        raise RequestError(f"X/Y/Z plot: {pictures} pictures were requested. Use at most {MAX_PICTURES}: take fewer values.")
    width, height = _largest_size(p, axes)
    megapixels = megapixels_of_grid(pictures, width, height, margin_px)
    if megapixels > float(p.options.img_max_size_mp):
        raise RequestError(
            f"X/Y/Z plot: {pictures} pictures of {width}x{height} make a grid of {megapixels:.0f} megapixels, but the setting "
            f"'Largest grid to save' allows {p.options.img_max_size_mp}. Use fewer values or smaller pictures, or raise the limit."
        )


def _largest_size(p: StableDiffusionProcessing, axes: Sequence[Axis]) -> tuple[int, int]:
    """Width and height of a cell that every picture fits into: the request's, or the largest of the axis Size."""
    one, sizes = copy_request(p), []
    for axis in axes:
        for value in axis.values if axis.option.label == "Size" else ():
            axis.option.apply(one, value, axis.values)
            sizes.append((one.width, one.height))
    return max((width for width, _ in sizes), default=p.width), max((height for _, height in sizes), default=p.height)


def _cell_size(cells: Mapping[tuple[int, ...], Image.Image]) -> tuple[int, int]:
    return max(picture.width for picture in cells.values()), max(picture.height for picture in cells.values())


def _comment_on_size(p: StableDiffusionProcessing, axes: Sequence[Axis], cells: Mapping[tuple[int, ...], Image.Image], margin_px: int) -> str:
    """Why no grid is drawn if the pictures came out larger than asked for (hires fix); empty if it is."""
    megapixels = megapixels_of_grid(math.prod(len(axis.values) for axis in axes), *_cell_size(cells), margin_px)
    if megapixels <= float(p.options.img_max_size_mp):
        return ""
    return f"X/Y/Z plot: no grid of {megapixels:.3g} megapixels was drawn; the setting 'Largest grid to save' allows {p.options.img_max_size_mp}.\n"


def _draw_grids(
    p: StableDiffusionProcessing, axes: Sequence[Axis], cells: dict[tuple[int, ...], Image.Image], *, draw_legend: bool, margin_px: int
) -> list[Image.Image]:
    """The whole grid, then, if Z has several values, the grid of each."""
    xs, ys, zs = ([[images.GridAnnotation(label)] for label in axis.labels(p)] for axis in axes)
    size = _cell_size(cells)
    empty = Image.new("RGB", size, p.options.grid_background_color)
    grids = []
    for z in range(len(zs)):
        pictures = [_fitted(cells.get((x, y, z), empty), size, empty) for y in range(len(ys)) for x in range(len(xs))]
        grid = images.image_grid(pictures, rows=len(ys))
        grids.append(images.draw_grid_annotations(grid, *size, xs, ys, margin_px) if draw_legend else grid)
    if len(grids) == 1:
        return grids
    whole = images.image_grid(grids, rows=1)
    if draw_legend:
        whole = images.draw_grid_annotations(whole, grids[0].width, grids[0].height, zs, [[images.GridAnnotation()]], margin_px)
    return [whole, *grids]


def _fitted(picture: Image.Image, size: tuple[int, int], empty: Image.Image) -> Image.Image:
    """The picture centered on a cell; pictures of one grid may differ in size."""
    if picture.size == size:
        return picture
    cell = empty.copy()
    cell.paste(picture)
    return cell

"""Optical flow: read from a pair of grey videos, a pair of frame folders or a .npy, or computed from the video.

Letters: N frames chosen, T frames, H W pixels; the two channels are u (to the right) and v (downwards).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import cv2
import numpy as np

from mbcd_cli.data.media.arrays import load_npy
from mbcd_cli.data.media.checks import REPLACE, Choose, Notes, chosen_indices, is_folder, span_in_frames, tolerate
from mbcd_cli.data.media.folders import beginnings, counts_from, folder_span, frames_of, read_folder
from mbcd_cli.data.media.timeline import Timeline
from mbcd_cli.data.media.video import read_frames, resize_short_side, timeline_of
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import DatasetSettings

_ODD_FRAMES = 3  # by which the two files of a pair may differ; the reference's loader falls back as far


def read_flow(
    media: Media,
    choose: Choose,
    *,
    dataset: DatasetSettings,
    bound: float = 20.0,
    short_side: int | None = None,
    notes: Notes = None,
) -> np.ndarray:
    """Chosen flow frames: a pair of grey videos or frame folders, one .npy [T, H, W, 2], or computed from a video.

    Args:
        media: `path` is u and `path_v` is v; `computed` means that `path` is the RGB video.
        choose: (flow frames in the span) -> ascending indices; computed flow has one frame fewer than its video.
        dataset: `min_frames` and `missing_frames`.
        bound: pixels per frame that map to the ends of 0..255 (computed flow, and .npy of floats).
        short_side: frames are first shrunk to this short side before flow is computed.
        notes: collects what was mended, if given.

    Returns:
        [N, H, W, 2] uint8, 128 being no motion.

    Raises:
        MediaError: as `read_frames`; or the two files of a pair do not match.
    """
    if media.computed:
        return _computed_flow(media, choose, dataset=dataset, bound=bound, short_side=short_side, notes=notes)
    if media.path_v is None:
        return _flow_array(media, choose, dataset=dataset, bound=bound, notes=notes)
    if is_folder(media.path):
        grey = {"dataset": dataset, "notes": notes, "grey": True}
        if not is_folder(media.path_v):
            raise MediaError(media.path_v, "the second direction of the flow is missing", "Complete the download.")
        u = read_folder(media, choose, second=media.path_v, **grey)
        # The span is u's even where v's own folder ends elsewhere, so both are asked for the same numbers.
        first, last = folder_span(media, frames_of(media.path))
        base = counts_from(media.path_v)
        twin = Media(media.path_v, start=first - base, stop=last - base, unit="frame")
        v = read_folder(twin, choose, second=media.path, **grey)
    else:
        if not media.path.exists() and {"flow_x_", "flow_y_"} <= beginnings(media.path.parent):  # as denseflow writes
            raise MediaError(
                media.path.parent,
                "both directions lie in one folder (flow_x_..., flow_y_...)",
                "Move flow_x_* into u/ and flow_y_* into v/ inside it.",
            )
        u, v = _read_pair(_told_by_video(media), choose, dataset=dataset, notes=notes)
    if u.shape != v.shape:
        cause = f"its frames are {v.shape[2]}x{v.shape[1]}, those of {media.path.name} {u.shape[2]}x{u.shape[1]}"
        raise MediaError(media.path_v, cause, "Make the flow of this clip again.")
    return np.stack([u, v], axis=-1)


def _told_by_video(media: Media) -> Media:
    """Flow with as many `frames` as there are between those of the video that it was made of."""
    if media.clock is None:
        return media
    try:
        return replace(media, frames=len(timeline_of(media.clock)) - 1)
    except MediaError:  # the video's own affair
        return media


def _read_pair(media: Media, choose: Choose, *, dataset: DatasetSettings, notes: Notes) -> list[np.ndarray]:
    """The same frames [N, H, W] of both files, among those that both have.

    Raises:
        MediaError: the files are not in step, or of lengths that differ by more than rounding.
    """
    pair = (media, replace(media, path=media.path_v, path_v=None))
    counts = [0, 0]
    timelines: list[Timeline | None] = [None, None]
    limit: int | None = None

    def read(side: int) -> np.ndarray:
        def counted(count: int) -> np.ndarray:
            counts[side] = count
            return choose(count if limit is None else limit)

        told = partial(timelines.__setitem__, side)
        return read_frames(pair[side], counted, dataset=dataset, notes=notes, slack=1, told=told)[..., 0]

    both = [read(0), read(1)]
    _check_in_step(media, *timelines)
    if counts[0] == counts[1]:
        return both
    cause = f"{counts[1]} frames, and its other direction {media.path.name} has {counts[0]}"
    if abs(counts[0] - counts[1]) > _ODD_FRAMES:
        raise MediaError(media.path_v, cause, "Make the flow of this clip again.")
    tolerate(media.path_v, cause, dataset, notes, used="the frames that both have")
    limit = min(counts)
    return [read(0), read(1)]


def _check_in_step(media: Media, u: Timeline | None, v: Timeline | None) -> None:
    """Frames of one number are shown at one time in both files.

    Raises:
        MediaError: one file begins later, or lacks a frame in its middle.
    """
    if u is None or v is None:
        return
    moments = [timeline.starts[: min(len(u), len(v))] + timeline.zero for timeline in (u, v)]
    apart = np.abs(moments[0] - moments[1]) > u.step / 2
    if apart.any():
        number = int(apart.argmax())
        ours, others = (float(at[number]) for at in reversed(moments))
        cause = f"its frame {number} is shown at {ours:.3f} s, that of {media.path.name} at {others:.3f} s"
        raise MediaError(media.path_v, cause, "Make the flow of this clip again.")


def _flow_array(media: Media, choose: Choose, *, dataset: DatasetSettings, bound: float, notes: Notes) -> np.ndarray:
    flow = load_npy(media.path)
    if flow.ndim != 4 or flow.shape[-1] != 2:
        raise MediaError(media.path, f"shape {flow.shape} where flow has [T, H, W, 2]", "Store u and v last.")
    if media.unit == "s" and not (media.start is None and media.stop is None):
        raise MediaError(media.path, "an array has no times, and the clip's span is in seconds", "Give it in frames.")
    first, last = span_in_frames(media, len(flow), dataset=dataset, notes=notes, slack=1)
    chosen = flow[first + chosen_indices(choose, last - first)]
    if chosen.dtype == np.uint8:
        return np.ascontiguousarray(chosen)
    if not np.isfinite(chosen).all():
        raise MediaError(media.path, "it holds values that are not finite (NaN or infinity)", REPLACE)
    return quantise_flow(chosen, bound)


def quantise_flow(flow: np.ndarray, bound: float) -> np.ndarray:
    """[...] pixels per frame -> [...] uint8: -bound..bound is 1..255, 128 no motion; what is beyond is clipped."""
    return np.rint(128.0 + np.clip(flow, -bound, bound) * (127.0 / bound)).astype(np.uint8)


def compute_flow(frames: np.ndarray, bound: float = 20.0) -> np.ndarray:
    """Dense optical flow between neighbouring frames (OpenCV DIS, medium preset).

    Args:
        frames: [T, H, W, 3] uint8, RGB.
        bound: pixels per frame that map to the ends of the range.

    Returns:
        [T - 1, H, W, 2] uint8: u to the right, v downwards, 128 being no motion (`quantise_flow`).
    """
    greys = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in frames]
    return np.stack([quantise_flow(_dis(before, after), bound) for before, after in pairwise(greys)])


def _dis(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    # DIS's pyramid needs some 12 pixels a side; smaller frames are enlarged by whole factors and scaled back.
    height, width = before.shape
    factor = -(-32 // min(height, width))
    if factor > 1:
        size = (width * factor, height * factor)
        before, after = (cv2.resize(x, size, interpolation=cv2.INTER_LINEAR) for x in (before, after))
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(before, after, None)
    if factor > 1:
        flow = cv2.resize(flow, (width, height), interpolation=cv2.INTER_AREA) / factor
    return flow


def _computed_flow(
    media: Media,
    choose: Choose,
    *,
    dataset: DatasetSettings,
    bound: float,
    short_side: int | None,
    notes: Notes,
) -> np.ndarray:
    stride = media.computed

    def both_ends(count: int) -> np.ndarray:
        first = stride * chosen_indices(choose, max((count - 1) // stride, 1))
        return np.minimum(np.stack([first, first + stride], axis=-1), count - 1)

    pairs = read_frames(media, both_ends, dataset=dataset, notes=notes)
    if short_side is not None and min(pairs.shape[2:4]) > short_side:
        pairs = np.stack([resize_short_side(pair, short_side) for pair in pairs])
    return np.concatenate([compute_flow(pair, bound) for pair in pairs])
